"""The results of training runs: tables for the terminal, and a page with curves that needs nothing but a browser.

Both take runs as `granet.report.rundata.read_run` returns them, finished or not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from granet.report import charts, comparison, masks
from granet.report.rundata import RunData, labels
from granet.text import duration, si
from granet.train import checkpoint

if TYPE_CHECKING:
    import altair
    from rich.table import Table

MARK = b'<meta name="generator" content="granet">'


def summary_tables(runs: Sequence[RunData], width: int | None = None) -> Iterator[tuple[str, "Table"]]:
    """Yields title and table for the terminal, one for each group of runs that can be compared, with one row per run.

    Args:
        runs: The runs.
        width: The width of the terminal. A wider table is continued in further ones, each of which repeats the names
            of the runs. Without a width no table is broken.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    for group in comparison.groups(labels(runs)):
        head, *body = _cells(group)
        widths = [max(map(cell_len, column)) for column in zip(head, *body, strict=True)]
        wide = (width or sum(widths) + 2 * len(widths) + 3) - 3  # without the table's edges
        name = max(20, min(widths[0], wide // 2))
        title = comparison.title(next(iter(group.values())))
        for block in comparison.blocks([name, *widths[1:]], wide, gap=2):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            for column in block:
                left = column == 0 or head[column] == DIFFERS
                limit = name if column == 0 else wide - name - 2
                table.add_column(
                    head[column], justify="left" if left else "right", overflow="fold", no_wrap=not left,
                    max_width=limit,
                )  # fmt: skip
            for row in body:
                table.add_row(*(Text(row[column]) for column in block))  # as text: a name is no markup
            yield title, table
            title = ""


def _cells(group: Mapping[str, RunData]) -> list[list[str]]:
    """Returns a table as text, headings first; its last column says in what the runs differ, if they do."""
    differs = comparison.differences(group)
    rows = [[column.heading for column in COLUMNS]]
    rows += [[column.text(run, label) for column in COLUMNS] for label, run in group.items()]
    if any(differs.values()):
        rows = [[*row, last] for row, last in zip(rows, [DIFFERS, *differs.values()], strict=True)]
    return rows


def _finished(text):
    return lambda run, label: text(run.summary) if run.summary else "…"


def _pattern(summary):
    pattern = summary.get("pattern", "unstructured")
    return "" if pattern == "unstructured" else f", {pattern}"


def _accuracy(which: str):
    def text(summary):
        scores = summary[which]
        return (
            "-" if scores is None or scores.get("test_accuracy") is None else f"{100 * scores['test_accuracy']:.2f} %"
        )

    return _finished(text)


def _ratio(kind: str):
    return _finished(
        lambda summary: f"{summary['flops'][kind] / summary['flops'][kind + '_dense']:.3f}\N{MULTIPLICATION SIGN}"
    )


class Column(NamedTuple):
    """A column of the table of runs: its heading, the text of a run under a label, and an explanation."""

    heading: str
    text: Callable[[RunData, str], str]
    explanation: str


DIFFERS = "differs in"
INFERENCE, TRAINING = (f"{part} \N{MULTIPLICATION SIGN}" for part in ("inference", "training"))
COLUMNS = (
    Column("run", lambda run, label: label if run.summary else f"{label} (unfinished)", "name of the run"),
    Column(
        "sparsity",
        _finished(lambda summary: f"{100 * summary['sparsity']:.2f} %{_pattern(summary)}"),
        "share of the weights of the sparse layers that are inactive",
    ),
    Column("test, best", _accuracy("best"), "test accuracy of the checkpoint with the best validation accuracy"),
    Column("test, last", _accuracy("last"), "test accuracy of the weights after the last step"),
    Column(
        "weights active",
        _finished(lambda summary: f"{summary['parameters']['active']:,}"),
        "active weights and all other parameters of the network",
    ),
    Column(
        "inference FLOPs",
        _finished(lambda summary: si(summary["flops"]["inference"])),
        "floating-point operations of a forward pass of one example",
    ),
    Column(INFERENCE, _ratio("inference"), "inference FLOPs as a share of the dense network's"),
    Column(
        "training FLOPs",
        _finished(lambda summary: si(summary["flops"]["training"])),
        "floating-point operations of the whole training",
    ),
    Column(TRAINING, _ratio("training"), "training FLOPs as a share of the dense network's"),
    Column("time", _finished(lambda summary: duration(summary["seconds"])), "time spent in training"),
)
EXPLANATIONS = {column.heading: column.explanation for column in COLUMNS} | {
    DIFFERS: "settings, other than the method, that the compared runs do not have in common"
}
ABOUT_BEST = "“best” is the checkpoint with the best validation accuracy at target sparsity."
ABOUT_FLOPS = (
    "A weight costs 2 FLOPs each time it is used while active; a training step is three forward passes, the third "
    "dense where growth needs the gradient of inactive weights."
)
PICTURED = 6  # runs whose masks are shown: the checkpoint of each must be read


def require() -> None:
    """Checks that reports can be written, so that a long piece of work can ask before it begins.

    Raises:
        ModuleNotFoundError: The libraries that draw are not installed; the message names them and the extra.
    """
    missing = [name for name in ("altair", "jinja2", "vl_convert") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'a report needs {", ".join(missing)}: pip install "granet[train]"')


def write_report(runs: Sequence[RunData], path: str | Path, *, subject: str | Path | None = None) -> Path:
    """Returns where the page was written: table, curves and layers of one run, or of several beside one another.

    The page holds its scripts and data and loads nothing.

    Args:
        runs: The runs.
        path: Where to write the page.
        subject: Directory of the run that the numbers at the top are about; by default the first sparse run that has
            a dense twin.

    Raises:
        ValueError: No runs are given.
        ModuleNotFoundError: The libraries that draw are not installed; the message says how to install them.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    labelled = labels(runs)
    groups = comparison.groups(labelled)
    dense = next((label for label, run in labelled.items() if run.is_dense and len(runs) > 1), None)
    others = [label for label in labelled if label != dense]
    found = dict(zip(others, charts.colours(len(others)), strict=True))
    colours = {label: found.get(label, charts.DENSE_COLOUR) for label in labelled}
    tables = [_cells(group) for group in groups]
    headings = max((table[0] for table in tables), key=len)
    rows = []
    for group, (_, *body) in zip(groups, tables, strict=True):
        rows += [([comparison.title(next(iter(group.values())))], None)] if len(groups) > 1 else []
        rows += [
            (row + [""] * (len(headings) - len(row)), colours[label]) for label, row in zip(group, body, strict=True)
        ]
    about = next((label for label, run in labelled.items() if subject is not None and run.path == Path(subject)), None)
    sparse = {label: run for label, run in labelled.items() if not run.is_dense}
    return write_page(
        path,
        title=" · ".join(labelled) if len(runs) < 4 else f"{len(runs)} runs",
        headings=headings,
        explanations=EXPLANATIONS,
        prose=[DIFFERS],
        rows=rows,
        notes=[f"{ABOUT_BEST} {ABOUT_FLOPS}"],
        runs=labelled,
        colours=colours,
        headlines=[headline for group in groups if (headline := _headline(group, about))],
        masks={label: shown for label in list(sparse)[:PICTURED] if (shown := masks.pictures(sparse[label]))},
        drawn=_drawn(groups, colours),
    )


def _drawn(groups: Sequence[Mapping[str, RunData]], colours: Mapping[str, str]) -> Iterator[tuple]:
    """Yields the charts of each group: curves of different tasks have no axis in common."""
    for group in groups:
        suffix = f", {comparison.title(next(iter(group.values())))}" if len(groups) > 1 else ""
        for title, *rest in charts.run_charts(group, {label: colours[label] for label in group}):
            yield f"{title}{suffix}", *rest


def write_page(
    path: str | Path, *, drawn: Iterable[tuple[str, str, bool, "altair.TopLevelMixin"]], **contents: Any
) -> Path:
    """Returns where the page was written: a table with charts below it, which needs nothing but a browser.

    Args:
        path: Where to write it.
        drawn: Title, note, whether it takes the whole width, and chart.
        contents: What the template shows: `title`, `headings`, `rows` with their colours, `colours` of the legend,
            and, where there are any, `runs`, `headlines`, `notes`, `masks` by run and layer, `explanations` of
            headings, and as `prose` the headings of columns of text, whose lines are broken. A row of a single text,
            without a colour, is a title of the rows below it.

    Raises:
        ModuleNotFoundError: The libraries that draw are not installed; the message says how to install them.
    """
    require()
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("granet.report"), autoescape=True, trim_blocks=True)
    empty = {"runs": {}, "headlines": [], "notes": [], "masks": {}, "explanations": {}, "prose": []}
    page = environment.get_template("report.html.j2").render(
        empty | contents,
        charts=[
            {"title": title, "note": note, "wide": wide, "spec": chart.to_dict()} for title, note, wide, chart in drawn
        ],
        si=si,
        script=_script(),
    )
    path = Path(path)
    checkpoint.replace(path, page)
    return path


def is_page(path: Path) -> bool:
    """Returns whether a file is a page that granet wrote."""
    with path.open("rb") as file:
        return MARK in file.read(2000)


@cache  # putting it together takes seconds
def _script() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script, in the versions that Altair writes for."""
    import altair
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", altair.SCHEMA_VERSION.rpartition(".")[0])


def _headline(group: Mapping[str, RunData], subject: str | None) -> tuple[str, str, list[tuple[str, str, str]]] | None:
    """Returns the label of one of the runs that can be compared, its task, and its tiles; None if none is finished."""
    label, twin = comparison.pair(group, subject)
    if label is None:
        return None
    run = group[label]
    parameters, flops, accuracy = run.summary["parameters"], run.summary["flops"], run.score["test_accuracy"]
    against = "best by validation" if run.summary["best"] else "last weights"
    if twin is not None:
        against = f"{100 * (accuracy - group[twin].score['test_accuracy']):+.2f} points to {twin}"
    tiles = [
        ("test accuracy", f"{100 * accuracy:.2f} %", against),
        ("weights active", f"{parameters['active']:,}", f"of {parameters['total']:,}"),
        (
            "inference FLOPs",
            f"{flops['inference'] / flops['inference_dense']:.3f}\N{MULTIPLICATION SIGN}",
            f"of {si(flops['inference_dense'])} dense",
        ),
        (
            "training FLOPs",
            f"{flops['training'] / flops['training_dense']:.3f}\N{MULTIPLICATION SIGN}",
            f"of {si(flops['training_dense'])} dense",
        ),
    ]
    return label, comparison.title(run), tiles
