"""Rows of a table, as frozen values, written as CSV."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from granet.train import checkpoint


def csv_of(kind: type, rows: Iterable[object], path: str | Path | None = None) -> str:
    """Returns values of the dataclass `kind` as CSV, numbers to six digits, and writes it to `path` if one is given.

    >>> from dataclasses import make_dataclass
    >>> Row = make_dataclass("Row", ["layer", "accuracy"])
    >>> print(csv_of(Row, [Row("conv1", 2 / 3)]), end="")
    layer,accuracy
    conv1,0.666667
    """
    rounded = ([round(x, 6) if isinstance(x, float) else x for x in asdict(row).values()] for row in rows)
    text = csv_text([field.name for field in fields(kind)], rounded)
    if path is not None:
        checkpoint.replace(Path(path), text)
    return text


def csv_text(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """Returns a head and lines of cells as CSV.

    >>> csv_text(["layer", "kept"], [["conv1, conv2", None]])
    'layer,kept\\n"conv1, conv2",\\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    return text.getvalue()
