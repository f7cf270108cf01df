"""Rows as CSV: read back by the standard reader, written whole or not at all."""

import csv
from dataclasses import dataclass

from granet.lab.rows import csv_of


@dataclass(frozen=True)
class Row:
    name: str
    accuracy: float
    runs: int | None = None


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    path.parent.mkdir()
    text = csv_of(Row, [Row('a, "b"', 1 / 3), Row("c", 1.0, 3)], path)
    assert path.read_text() == text
    assert list(csv.DictReader(text.splitlines())) == [
        {"name": 'a, "b"', "accuracy": "0.333333", "runs": ""},
        {"name": "c", "accuracy": "1.0", "runs": "3"},
    ]


def test_no_rows_leave_the_headings():
    assert csv_of(Row, []) == "name,accuracy,runs\n"
