"""What training runs came to: a table for the terminal, and a page with curves that needs nothing but a browser.

Both read run directories (`granet.train.run` says what is in one), finished or not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granet import files
from granet import parsing as texts
from granet.report import charts, comparison
from granet.train import checkpoint
from granet.train.summary import read_object, read_records, read_summary

if TYPE_CHECKING:
    import altair
    from rich.table import Table

MARK = b'<meta name="generator" content="granet">'


@dataclass(frozen=True, eq=False)
class RunData:
    """What a run directory says."""

    path: Path
    recipe: str  # YAML
    environment: dict[str, Any]
    records: tuple[dict[str, Any], ...]  # of metrics.jsonl
    summary: dict[str, Any] | None  # None until the run is finished

    @property
    def name(self) -> str:
        """The recipe's name, or the directory's while the run is not finished."""
        return self.summary["name"] if self.summary else self.path.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe as a mapping."""
        return texts.from_yaml(self.recipe)

    @property
    def is_dense(self) -> bool:
        """Whether it is finished and has no inactive weights."""
        return self.summary is not None and not self.summary["sparsity"]

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The records of training batches."""
        return [record for record in self.records if record["kind"] == "train"]

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """The records of evaluations."""
        return [record for record in self.records if record["kind"] == "eval"]

    @cached_property
    def updates(self) -> list[dict[str, Any]]:
        """The records of topology updates."""
        return [record for record in self.records if record["kind"] == "update"]


def read_run(path: str | Path) -> RunData:
    """Return what the run directory `path` says; a last line of metrics that is half written is left out.

    Raises:
        FileNotFoundError: It is no run directory.
        ValueError: A file in it is damaged; the message names file and line.
    """
    path = Path(path)
    missing = [name for name in ("recipe.yaml", "metrics.jsonl") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is not the directory of a run: it has no {' and no '.join(missing)}")
    environment, summary = read_object(path / "environment.json"), read_summary(path / "summary.json")
    records = tuple(read_records(path / "metrics.jsonl"))
    try:
        recipe = files.read(path / "recipe.yaml").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / 'recipe.yaml'} is damaged: {error}") from None
    run = RunData(path, recipe, environment or {}, records, summary)
    try:
        whole = isinstance(run.settings, dict)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{path / 'recipe.yaml'} is damaged: it is no recipe")
    return run


def summary_tables(runs: Sequence[RunData], width: int | None = None) -> Iterator[tuple[str, "Table"]]:
    """Yield title and table for the terminal of runs that can be compared, one a row; others have another table.

    Args:
        runs: The runs.
        width: Where a table is wider, it is continued in further ones, each with the names of the runs. Without a
            width no table is broken.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    for group in comparison.groups(_labelled(runs)):
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
    """Return a table as text, the headings first; what differs is its last column where anything does."""
    differs = comparison.differences(group)
    rows = [[heading for heading, _ in COLUMNS], *([text(run, x) for _, text in COLUMNS] for x, run in group.items())]
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


def si(number: float) -> str:
    """Return a number in three digits and a prefix.

    >>> si(8.18e9), si(72_608), si(0)
    ('8.18 G', '72.6 k', '0')
    """
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            digits = number / factor
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f} {prefix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units.

    >>> duration(8.44), duration(75), duration(7320)
    ('8.4 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


DIFFERS = "differs in"
COLUMNS = (
    ("run", lambda run, label: label if run.summary else f"{label} (unfinished)"),
    ("sparsity", _finished(lambda summary: f"{100 * summary['sparsity']:.2f} %{_pattern(summary)}")),
    ("test, best", _accuracy("best")),
    ("test, last", _accuracy("last")),
    ("weights active", _finished(lambda summary: f"{summary['parameters']['active']:,}")),
    ("inference FLOPs", _finished(lambda summary: si(summary["flops"]["inference"]))),
    ("\N{MULTIPLICATION SIGN} dense", _ratio("inference")),
    ("training FLOPs", _finished(lambda summary: si(summary["flops"]["training"]))),
    ("\N{MULTIPLICATION SIGN} dense", _ratio("training")),
    ("time", _finished(lambda summary: duration(summary["seconds"]))),
)


def _labelled(runs: Sequence[RunData]) -> dict[str, RunData]:
    """Return the runs by name, or by directory where names clash."""
    names = [run.name for run in runs]
    by_label = {run.name if names.count(run.name) == 1 else run.path.name: run for run in runs}
    return by_label if len(by_label) == len(runs) else {str(run.path): run for run in runs}


def require() -> None:
    """Does nothing where reports can be written, so that a long piece of work can ask before it begins.

    Raises:
        ModuleNotFoundError: The libraries that draw are not installed; the message names them and the extra.
    """
    missing = [name for name in ("altair", "jinja2", "vl_convert") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'a report needs {", ".join(missing)}: pip install "granet[train]"')


def write_report(runs: Sequence[RunData], path: str | Path) -> Path:
    """Return where the page was written: table, curves and layers of one run, or of several beside one another.

    The page holds its scripts and data and loads nothing.

    Raises:
        ValueError: No runs are given.
        ModuleNotFoundError: The libraries that draw are not installed; the message says how to.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    labelled = _labelled(runs)
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
    return write_page(
        path,
        title=" · ".join(labelled) if len(runs) < 4 else f"{len(runs)} runs",
        headings=headings,
        rows=rows,
        runs=labelled,
        colours=colours,
        headlines=[headline for group in groups if (headline := _headline(group))],
        drawn=_drawn(groups, colours),
    )


def _drawn(groups: Sequence[Mapping[str, RunData]], colours: Mapping[str, str]) -> Iterator[tuple]:
    """Yield the charts of each group: curves of different tasks have no axis in common."""
    for group in groups:
        of = f", {comparison.title(next(iter(group.values())))}" if len(groups) > 1 else ""
        for title, *rest in charts.of(group, {label: colours[label] for label in group}):
            yield f"{title}{of}", *rest


def write_page(
    path: str | Path, *, drawn: Iterable[tuple[str, str, bool, "altair.TopLevelMixin"]], **contents: Any
) -> Path:
    """Return where the page was written: a table with charts below it, which needs nothing but a browser.

    Args:
        path: Where to write it.
        drawn: Title, note, whether it takes the whole width, and chart.
        contents: What the template shows: `title`, `headings`, `rows` with their colours, `colours` of the legend,
            and, where there are any, `runs`, `headlines` and `notes`. A row of a single text, without a colour, is a
            title of the rows below it.

    Raises:
        ModuleNotFoundError: The libraries that draw are not installed; the message says how to.
    """
    require()
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("granet.report"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        {"runs": {}, "headlines": [], "notes": []} | contents,
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
    """Return whether a file is a page that granet wrote."""
    with path.open("rb") as file:
        return MARK in file.read(2000)


@cache  # putting it together takes seconds
def _script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, of the version that Altair writes for."""
    import altair
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", altair.SCHEMA_VERSION.rpartition(".")[0])


def _headline(group: Mapping[str, RunData]) -> tuple[str, list[tuple[str, str, str]]] | None:
    """Return what a headline says of one of the runs that can be compared: whose it is, and its tiles."""
    label, twin = comparison.pair(group)
    if label is None:
        return None
    summary = group[label].summary
    parameters, flops, best = summary["parameters"], summary["flops"], summary["best"] or summary["last"]
    against = "best by validation" if summary["best"] else "last weights"
    if twin is not None:
        other = group[twin].summary["best"] or group[twin].summary["last"]
        against = f"{100 * (best['test_accuracy'] - other['test_accuracy']):+.2f} points to {twin}"
    tiles = [
        ("test accuracy", f"{100 * best['test_accuracy']:.2f} %", against),
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
    return f"{label}: {comparison.title(group[label])}", tiles
