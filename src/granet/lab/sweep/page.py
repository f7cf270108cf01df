"""The files of a sweep: the table in Markdown, all runs as CSV, and a page with plots."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from granet.lab.sweep import table
from granet.lab.sweep.grid import Sweep
from granet.lab.sweep.run import Done
from granet.lab.sweep.table import Row
from granet.report import charts
from granet.report import page as report
from granet.train import checkpoint


def write(sweep: Sweep, rows: Sequence[Row], done: Iterable[Done], out: Path) -> dict[str, Path]:
    """Returns where the files were written in the folder ``out``: table, runs and report.

    Raises:
        ModuleNotFoundError: the libraries that draw are not installed; the tables are written all the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = {"table": out / "table.md", "runs": out / "runs.csv", "report": out / "report.html"}
    checkpoint.replace(written["table"], table.markdown(sweep, rows))
    checkpoint.replace(written["runs"], table.runs_csv(sweep, done))
    lines, notes = table.cells_of(sweep, rows)
    labels = list(dict.fromkeys(row.label for row in rows))
    dense = {row.label for row in rows if row.is_dense}
    colours = dict(zip(labels, charts.colours(len(labels)), strict=True)) | dict.fromkeys(dense, charts.DENSE_COLOUR)
    report.write_page(
        written["report"],
        title=sweep.name,
        headings=lines[0],
        rows=[(line, colours[row.label]) for line, row in zip(lines[1:], rows, strict=True)],
        notes=[
            f"{report.ABOUT_BEST} {report.ABOUT_FLOPS}",
            table.about(sweep),
            *notes,
            *map(str, table.gaps(sweep, rows)),
        ],
        colours=colours,
        drawn=charts.sweep_charts(_points(sweep, rows), colours, select=sweep.report.select),
    )
    return written


def _points(sweep: Sweep, rows: Sequence[Row]) -> list[dict]:
    """Returns a point for each line of the table that has accuracies, those of one curve under one ``curve``."""
    points = []
    for row in rows:
        accuracies = row.accuracies(sweep.report.select)
        if not accuracies:
            continue
        others = [f"{key} {value}" for key, value in row.settings if key != "method.sparsity" and value is not None]
        points.append(
            {
                "task": row.task, "method": row.label, "curve": ", ".join([row.label, *others]),
                "runs": len(accuracies), "accuracy": sum(accuracies) / len(accuracies), "sparsity": row.sparsity,
                "training": row.training, "inference": row.inference, "deviation": table.deviation(accuracies),
                "dense": row.is_dense,
            }
        )  # fmt: skip
    return points
