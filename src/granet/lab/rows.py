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
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: round(x, 6) if isinstance(x, float) else x for key, x in asdict(row).items()})
    if path is not None:
        checkpoint.replace(Path(path), text.getvalue())
    return text.getvalue()
