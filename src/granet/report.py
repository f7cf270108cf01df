"""What training runs came to: a table for the terminal, and a page with curves that needs nothing but a browser.

Both read run directories (`granet.run` says what is in one), finished or not.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granet import checkpoint

if TYPE_CHECKING:
    import altair
    from rich.table import Table

COLOURS = ("#2f6fde", "#d9730d", "#0f9d76", "#c2408f", "#7d56d8", "#1796b0", "#a8831a", "#cf4b43")
DENSE_COLOUR = "#8b929c"  # the twin stays in the background
POINTS = 600  # of a curve, more are averaged: a page for a long run stays small
UPDATES = 150  # columns of a heat map
NEEDED = {
    "name",
    "method",
    "model",
    "data",
    "seed",
    "sparsity",
    "parameters",
    "flops",
    "best",
    "last",
    "seconds",
    "layers",
}


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
    environment, summary = (_object(path / name) for name in ("environment.json", "summary.json"))
    if summary is not None and (lacks := NEEDED - summary.keys()):
        raise ValueError(f"{path / 'summary.json'} is damaged: it lacks {', '.join(sorted(lacks))}")
    records = tuple(_records(path / "metrics.jsonl"))
    return RunData(path, (path / "recipe.yaml").read_text(encoding="utf-8"), environment or {}, records, summary)


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return value


def _records(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # after the last \n is nothing, or the beginning of a line
        try:
            record = json.loads(line)
            if record["kind"] in ("train", "eval", "update"):
                record["step"], record["epoch"] = int(record["step"]), float(record["epoch"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is damaged: {error!r}") from error
        yield record


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

    >>> duration(8.44), duration(75), duration(7300)
    ('8.4 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


COLUMNS = (
    ("run", lambda run, label: label if run.summary else f"{label} (unfinished)"),
    ("sparsity", _finished(lambda summary: f"{100 * summary['sparsity']:.2f} %")),
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
    try:
        import altair
        import jinja2
        import vl_convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'a report needs {error.name}: pip install "granet[train]"') from error
    labelled = _labelled(runs)
    colours, free = {}, iter(COLOURS * (len(runs) // len(COLOURS) + 1))
    for label, run in labelled.items():
        colours[label] = DENSE_COLOUR if run.is_dense and len(runs) > 1 else next(free)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("granet"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        title=" · ".join(labelled) if len(runs) < 4 else f"{len(runs)} runs",
        headings=[heading for heading, _ in COLUMNS],
        rows=[([text(run, label) for _, text in COLUMNS], colours[label]) for label, run in labelled.items()],
        runs=labelled,
        colours=colours,
        tiles=_tiles(runs),
        charts=[
            {"title": title, "note": note, "wide": wide, "spec": chart.to_dict()}
            for title, note, wide, chart in _charts(labelled, colours)
        ],
        si=si,
        script=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", altair.SCHEMA_VERSION.rpartition(".")[0]),
    )
    path = Path(path)
    checkpoint.replace(path, page)
    return path


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
        against = f"{points:+.2f} points to the dense network"
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


def _thinned(records: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, float]]:
    """Return records of `keys` alone, neighbours averaged until no more than `POINTS` are left."""
    size = -(-len(records) // POINTS) or 1
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    return [{key: sum(record[key] for record in group) / len(group) for key in keys} for group in groups]


def _charts(runs: dict[str, RunData], colours: dict[str, str]) -> Iterable[tuple[str, str, bool, "altair.Chart"]]:
    """Yield title, note, whether it takes the whole width, and chart."""
    progress = [
        {"run": label, "of": split, **point}
        for label, run in runs.items()
        for split, records in (("training", run.train), ("validation", run.evals))
        for point in _thinned(records, ("step", "epoch", "loss", "accuracy"))
    ]
    if progress:
        yield "Accuracy", "solid: validation; faint: training", False, _curves(progress, "accuracy", colours, ".1%")
        yield "Loss", "solid: validation; faint: training", False, _curves(progress, "loss", colours, ".3f")
    sparse = {label: run for label, run in runs.items() if any(record["sparsity"] for record in run.evals)}
    sparsity = [
        {"run": label, "of": of, "step": point["step"], "epoch": point["epoch"], "sparsity": point[key]}
        for label, run in sparse.items()
        for of, key in (("mask", "sparsity"), ("realised", "realised_sparsity"))
        for point in _thinned(run.evals, ("step", "epoch", "sparsity", "realised_sparsity"))
    ]
    if sparsity:
        note = "solid: inactive weights; faint: weights that are zero, regrown ones not yet trained among them"
        yield "Sparsity", note, False, _curves(sparsity, "sparsity", colours, ".2%")
    updates = [
        {"run": label, "of": "update", **point}
        for label, run in runs.items()
        for point in _thinned([_with_churn(update) for update in run.updates], ("step", "epoch", *OF_UPDATES))
    ]
    for key, (title, note, digits) in OF_UPDATES.items():
        if any(point[key] for point in updates):
            yield title, note, False, _curves(updates, key, colours, digits)
    layers = [
        {"run": label, "layer": layer["name"], "active": layer["active"], "total": layer["total"],
         "density": layer["active"] / layer["total"]}
        for label, run in runs.items() if run.summary and not run.is_dense
        for layer in run.summary["layers"]
    ]  # fmt: skip
    if layers:
        yield (
            "Density of the layers at the end",
            "share of a layer's weights that are active",
            True,
            _bars(layers, colours),
        )
    for label, run in runs.items():
        if len(run.updates) > 1:
            note = f"{label}: share of active weights after each update"
            yield "Density of the layers over training", note, True, _heat_map(run)


OF_UPDATES = {
    "regeneration": ("Regeneration ratio", "share of a layer's active weights exchanged at an update", ".3f"),
    "exploration": ("Exploration R_s", "share of sparse weights that were ever active (ITOP)", ".1%"),
    "churn": ("Churn", "weights grown at an update, as a share of the active", ".2%"),
}


def _with_churn(update: dict[str, Any]) -> dict[str, Any]:
    active = sum(update["active"].values())
    return update | {"churn": sum(update["grown"].values()) / active if active else 0.0}


def _curves(points: list[dict], y: str, colours: dict[str, str], digits: str) -> "altair.LayerChart":
    import altair as alt

    colour = alt.Color("run:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)
    faint = alt.condition("datum.of == 'training' || datum.of == 'realised'", alt.value(0.35), alt.value(1))
    near = alt.selection_point(nearest=True, on="pointermove", clear="pointerout", fields=["epoch"], empty=False)
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("epoch:Q", title="epoch", scale=alt.Scale(nice=False), axis=alt.Axis(grid=False, tickMinStep=1)),
        y=alt.Y(f"{y}:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=digits, tickCount=5)),
        color=colour,
    )
    lines = base.mark_line(interpolate="linear").encode(opacity=faint, detail="of:N")
    tooltip = [alt.Tooltip("run:N"), alt.Tooltip("of:N", title="of"), alt.Tooltip("epoch:Q", format=".2f")]
    tooltip += [alt.Tooltip("step:Q", format=",.0f"), alt.Tooltip(f"{y}:Q", format=digits)]
    dots = base.mark_point(filled=True, size=45).encode(
        opacity=alt.condition(near, alt.value(1), alt.value(0)), tooltip=tooltip
    )
    return (lines + dots.add_params(near)).properties(width="container", height=220)


def _bars(layers: list[dict], colours: dict[str, str]) -> "altair.Chart":
    import altair as alt

    runs = len({layer["run"] for layer in layers})
    return (
        alt.Chart(alt.Data(values=layers))
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X("density:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", tickCount=5)),
            y=alt.Y("layer:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.25)),
            yOffset=alt.YOffset("run:N", sort=None),
            color=alt.Color(
                "run:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None
            ),
            tooltip=[
                "run:N", "layer:N", alt.Tooltip("density:Q", format=".2%"),
                alt.Tooltip("active:Q", format=","), alt.Tooltip("total:Q", format=","),
            ],
        )
        .properties(width="container", height=alt.Step(max(16 / runs, 6)))
    )  # fmt: skip


def _heat_map(run: RunData) -> "altair.Chart":
    import altair as alt

    # the first update's counts are no size of a layer: without a summary, the largest count seen stands for it
    totals = {layer["name"]: layer["total"] for layer in (run.summary or {"layers": []})["layers"]}
    for update in run.updates:
        for name, active in update["active"].items():
            totals.setdefault(name, 0)
            totals[name] = max(totals[name], active)
    shown = run.updates[:: -(-len(run.updates) // UPDATES)]
    ends = [update["epoch"] for update in shown[1:]] + [run.records[-1]["epoch"]]
    cells = [
        {"layer": name, "from": update["epoch"], "to": end, "step": update["step"], "active": active,
         "density": active / totals[name] if totals[name] else 0.0, "grown": update["grown"].get(name, 0),
         "dropped": update["dropped"].get(name, 0)}
        for update, end in zip(shown, ends, strict=True)
        for name, active in update["active"].items()
    ]  # fmt: skip
    return (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("from:Q", title="epoch", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(grid=False)),
            x2="to:Q",
            y=alt.Y("layer:N", title=None, sort=None),
            color=alt.Color(
                "density:Q",
                scale=alt.Scale(scheme="viridis", type="sqrt", domain=[0, 1]),
                legend=alt.Legend(format=".0%", title=None, values=[0, 0.05, 0.2, 0.5, 1]),
            ),
            tooltip=[
                "layer:N", alt.Tooltip("from:Q", title="epoch", format=".2f"), alt.Tooltip("step:Q", format=","),
                alt.Tooltip("density:Q", format=".2%"), alt.Tooltip("active:Q", format=","),
                alt.Tooltip("grown:Q", format=","), alt.Tooltip("dropped:Q", format=","),
            ],
        )
        .properties(width="container", height=alt.Step(16))
    )  # fmt: skip
