"""What training runs came to: a table for the terminal, and a page with curves that needs nothing but a browser.

Both read run directories (`granet.run` says what is in one), finished or not.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granet import charts, checkpoint, files
from granet.summary import read_object, read_records, read_summary

if TYPE_CHECKING:
    import altair
    from rich.table import Table


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
    return RunData(path, recipe, environment or {}, records, summary)


def summary_table(runs: Sequence[RunData]) -> "Table":
    """Return a table of the runs for the terminal, one a row."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, (heading, _) in enumerate(COLUMNS):
        table.add_column(
            heading, justify="left" if i == 0 else "right", no_wrap=True, overflow="fold" if i == 0 else "ellipsis"
        )
    for label, run in _labelled(runs).items():
        table.add_row(*(text(run, label) for _, text in COLUMNS))
    return table


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
    colours, free = {}, itertools.cycle(charts.COLOURS)
    for label, run in labelled.items():
        colours[label] = charts.DENSE_COLOUR if run.is_dense and len(runs) > 1 else next(free)
    return write_page(
        path,
        title=" · ".join(labelled) if len(runs) < 4 else f"{len(runs)} runs",
        headings=[heading for heading, _ in COLUMNS],
        rows=[([text(run, label) for _, text in COLUMNS], colours[label]) for label, run in labelled.items()],
        runs=labelled,
        colours=colours,
        tiles=_tiles(runs),
        drawn=charts.of(labelled, colours),
    )


def write_page(
    path: str | Path, *, drawn: Iterable[tuple[str, str, bool, "altair.TopLevelMixin"]], **contents: Any
) -> Path:
    """Return where the page was written: a table with charts below it, which needs nothing but a browser.

    Args:
        path: Where to write it.
        drawn: Title, note, whether it takes the whole width, and chart.
        contents: What the template shows: `title`, `headings`, `rows` with their colours, `colours` of the legend,
            and, where there are any, `runs`, `tiles` and `notes`.

    Raises:
        ModuleNotFoundError: The libraries that draw are not installed; the message says how to.
    """
    try:
        import jinja2

        script = _script()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'a report needs {error.name}: pip install "granet[train]"') from error
    environment = jinja2.Environment(loader=jinja2.PackageLoader("granet"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        {"runs": {}, "tiles": [], "notes": []} | contents,
        charts=[
            {"title": title, "note": note, "wide": wide, "spec": chart.to_dict()} for title, note, wide, chart in drawn
        ],
        si=si,
        script=script,
    )
    path = Path(path)
    checkpoint.replace(path, page)
    return path


@cache  # putting it together takes seconds
def _script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, of the version that Altair writes for."""
    import altair
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", altair.SCHEMA_VERSION.rpartition(".")[0])


def _tiles(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """Return the headline of the first finished sparse run, else of the first finished: what, how much, compared."""
    finished = sorted((run for run in runs if run.summary), key=lambda run: run.is_dense)
    if not finished:
        return []
    summary, twins = finished[0].summary, [run.summary for run in finished[1:] if run.is_dense]
    parameters, flops, best = summary["parameters"], summary["flops"], summary["best"] or summary["last"]
    against = f"best by validation, {summary['name']}"
    if twins and (twin := twins[0]["best"]):
        points = 100 * (best["test_accuracy"] - twin["test_accuracy"])
        against = f"{points:+.2f} points to dense"
    return [
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
