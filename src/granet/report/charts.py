"""The charts of a report, as Altair charts that leave the colours of text and background to the page."""

import colorsys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair

    from granet.report.rundata import RunData

COLOURS = ("#3a78e7", "#d9730d", "#0f9d76", "#c2408f", "#7d56d8", "#1796b0", "#a8831a", "#cf4b43")
DENSE_COLOUR = "#8b929c"  # the twin stays in the background
POINTS = 2400  # most points of a chart; neighbours are averaged beyond that, so that pages of long runs stay small
UPDATES = 150  # most columns of a heat map


def _thinned(records: list[dict[str, Any]], keys: tuple[str, ...], curves: int) -> list[dict[str, float]]:
    """Returns the `keys` of the records, neighbours averaged until a chart of `curves` such curves has few points."""
    size = -(-len(records) * curves // POINTS) or 1
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    return [{key: sum(record[key] for record in group) / len(group) for key in keys} for group in groups]


def run_charts(
    runs: Mapping[str, "RunData"], colours: Mapping[str, str]
) -> Iterator[tuple[str, str, bool, "altair.TopLevelMixin"]]:
    """Yields title, note, whether it takes the whole width, and chart, for everything that the runs have records of.

    Args:
        runs: Runs by the label that they have in the charts.
        colours: The colour of each label.
    """
    progress = [
        {"run": label, "of": split, **point}
        for label, run in runs.items()
        for split, records in (("training", run.train), ("validation", run.evals))
        for point in _thinned(records, ("step", "epoch", "loss", "accuracy"), 2 * len(runs))
    ]
    if progress:
        # the first steep rise is cut off, because it would leave no room for the differences that matter
        last: dict[str, float] = {}
        for point in progress:
            last[point["run"]] = max(point["epoch"], last.get(point["run"], 0.0))
        late = [point["accuracy"] for point in progress if point["epoch"] >= last[point["run"]] / 10]
        note, least = "solid: validation; faint: training", min(late, default=0.0)
        yield "Accuracy", note, False, _curves(progress, "accuracy", colours, ".2%", domain=[least, 1])
        yield "Loss", note, False, _curves(progress, "loss", colours, ".4f", scale="log")
    rates = [
        {"run": label, "of": "training", **point}
        for label, run in runs.items()
        for point in _thinned([record for record in run.train if "lr" in record], ("step", "epoch", "lr"), len(runs))
    ]
    if rates:
        yield "Learning rate", "at the steps of the training records", False, _curves(rates, "lr", colours, ".3~g")
    sparse = {label: run for label, run in runs.items() if any(record["sparsity"] for record in run.evals)}
    sparsity = [
        {"run": label, "of": kind, "step": point["step"], "epoch": point["epoch"], "sparsity": point[key]}
        for label, run in sparse.items()
        for kind, key in (("mask", "sparsity"), ("realised", "realised_sparsity"))
        for point in _thinned(run.evals, ("step", "epoch", "sparsity", "realised_sparsity"), 2 * len(runs))
    ]
    if sparsity:
        note = "solid: inactive weights; faint: weights that are zero, among them regrown ones that are not yet trained"
        yield "Sparsity", note, False, _curves(sparsity, "sparsity", colours, ".2%")
    updates = [
        {"run": label, "of": "update", **point}
        for label, run in runs.items()
        for point in _thinned(
            [_with_churn(update) for update in run.updates], ("step", "epoch", *UPDATE_CURVES), len(runs)
        )
    ]
    for key, (title, note, digits) in UPDATE_CURVES.items():
        if any(point[key] for point in updates):
            yield title, note, False, _curves(updates, key, colours, digits)
    classes = [
        {"run": label, "class": number, "accuracy": accuracy}
        for label, run in runs.items()
        if run.summary
        for number, accuracy in enumerate(run.score.get("test_accuracy_per_class") or ())
        if accuracy is not None
    ]
    if classes:
        note = "test accuracy on the images of each class: the best weights by validation, else the last"
        yield "Accuracy by class", note, False, _dots(classes, colours)
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


UPDATE_CURVES = {
    "regeneration": ("Regeneration ratio", "share of a layer's active weights exchanged at an update", ".3f"),
    "exploration": (
        "Exploration rate R\N{LATIN SUBSCRIPT SMALL LETTER S}",
        "share of sparse weights that were ever active (ITOP)",
        ".1%",
    ),
    "churn": ("Churn", "weights grown at an update, as a share of the active weights", ".2%"),
}


def _with_churn(update: dict[str, Any]) -> dict[str, Any]:
    active = sum(update["active"].values())
    return update | {"churn": sum(update["grown"].values()) / active if active else 0.0}


def _curves(
    points: list[dict],
    y: str,
    colours: Mapping[str, str],
    digits: str,
    *,
    domain: list[float] | None = None,
    scale: str = "linear",
) -> "altair.LayerChart":
    import altair as alt

    colour = alt.Color("run:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)
    both = len({point["of"] for point in points}) > 1
    faint = alt.condition(f"{str(both).lower()} && (datum.of == 'training' || datum.of == 'realised')",
                          alt.value(0.45), alt.value(1))  # fmt: skip
    count = Counter((point["run"], point["of"]) for point in points)
    # a line of a single point is invisible, so that point is always shown; others appear near the pointer
    points = [point | {"alone": count[point["run"], point["of"]] == 1} for point in points]
    near = alt.selection_point(nearest=True, on="pointermove", clear="pointerout", fields=["epoch"], empty=False)
    y_scale = (
        alt.Scale(type=scale, domain=domain, padding=5) if domain else alt.Scale(type=scale, zero=False, padding=5)
    )
    ticks = alt.Axis(format="~%" if digits.endswith("%") else "~g", tickCount=5)
    if scale == "log":
        points = [point for point in points if point[y] > 0]  # zero has no logarithm
        y_scale = alt.Scale(type=scale, padding=5)
        ticks = alt.Axis(format="~g", values=[10.0**power for power in range(-8, 9)])
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X(
            "epoch:Q", title="epoch", scale=alt.Scale(nice=False, padding=5), axis=alt.Axis(grid=False, tickCount=10)
        ),
        y=alt.Y(f"{y}:Q", title=None, scale=y_scale, axis=ticks),
        color=colour,
    )
    lines = base.mark_line(clip=True).encode(opacity=faint, detail="of:N")
    tooltip = [alt.Tooltip("run:N"), alt.Tooltip("of:N", title="of"), alt.Tooltip("epoch:Q", format=".2f")]
    tooltip += [alt.Tooltip("step:Q", format=",.0f"), alt.Tooltip(f"{y}:Q", format=digits)]
    dots = base.mark_point(filled=True, size=45, clip=True).encode(
        opacity=alt.when(near).then(alt.value(1)).when("datum.alone").then(alt.value(0.9)).otherwise(alt.value(0)),
        tooltip=tooltip,
    )
    return (lines + dots.add_params(near)).properties(width="container", height=220)


def _dots(classes: list[dict], colours: Mapping[str, str]) -> "altair.Chart":
    import altair as alt

    last = max(point["class"] for point in classes)
    return (
        alt.Chart(alt.Data(values=classes))
        .mark_point(filled=True, size=60, opacity=0.85)
        .encode(
            x=alt.X(
                "class:Q", title="class", scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
                axis=alt.Axis(grid=False, format="d", tickMinStep=1),
            ),
            y=alt.Y("accuracy:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format="~%", tickCount=5)),
            color=alt.Color(
                "run:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None
            ),
            tooltip=["run:N", "class:Q", alt.Tooltip("accuracy:Q", format=".2%")],
        )
        .properties(width="container", height=220)
    )  # fmt: skip


def _bars(layers: list[dict], colours: Mapping[str, str]) -> "altair.Chart":
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


def _heat_map(run: "RunData") -> "altair.Chart":
    import altair as alt

    # only the summary has the sizes of the layers; while there is none, the largest count seen stands for the size
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
            x=alt.X(
                "from:Q", title="epoch", scale=alt.Scale(nice=False, zero=False),
                axis=alt.Axis(grid=False, tickCount=10),
            ),
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


def colours(count: int) -> list[str]:
    """Returns `count` colours: those of the reports or, if there are too few, hues that are light and dark in turn."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    shades = (colorsys.hls_to_rgb(i / count, (0.4, 0.6)[i % 2], 0.65) for i in range(count))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in shades]


def sweep_charts(
    points: list[dict[str, Any]], colours: Mapping[str, str], *, select: str
) -> Iterator[tuple[str, str, bool, "altair.TopLevelMixin"]]:
    """Yields title, note, whether it takes the whole width, and chart: accuracy against sparsity and training FLOPs.

    Args:
        points: One for each line of the table: `task`, `method`, `curve`, `accuracy` (mean), `deviation`, `runs`,
            `sparsity`, `training` and `inference` (shares of dense), `dense`.
        colours: The colour of each method.
        select: Whose accuracy it is, `last` or `best` weights, for the titles.
    """
    for task in dict.fromkeys(point["task"] for point in points):
        mine = [
            point | {"low": point["accuracy"] - point["deviation"], "high": point["accuracy"] + point["deviation"]}
            for point in points
            if point["task"] == task
        ]
        title = f"{task}: test accuracy, {select} weights"
        note = "mean and standard deviation over seeds, against sparsity; dashed: dense"
        yield title, note, True, _against("sparsity", mine, colours)
        note = "mean and standard deviation over seeds, against training FLOPs as a share of dense"
        yield title, note, True, _against("training", mine, colours)


def _against(x: str, points: list[dict[str, Any]], colours: Mapping[str, str]) -> "altair.LayerChart":
    import altair as alt

    colour = alt.Color("method:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)
    y = alt.Y("accuracy:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format="~%", tickCount=5))
    shown = points if x == "training" else [point for point in points if not point["dense"]]
    if x == "training":
        ratios = [point["training"] for point in points]
        axis = alt.Axis(format="~g", grid=False)
        scale = alt.Scale(type="log", domain=[0.9 * min(ratios), 1.1 * max(ratios)])
        place = alt.X("training:Q", title="training FLOPs / dense", scale=scale, axis=axis)
    else:
        place = alt.X(
            "sparsity:Q", title="sparsity", scale=alt.Scale(zero=False), axis=alt.Axis(format="~%", grid=False)
        )
    tooltip = [
        alt.Tooltip("curve:N", title="method"), alt.Tooltip("sparsity:Q", format=".2%"),
        alt.Tooltip("accuracy:Q", format=".2%"), alt.Tooltip("deviation:Q", format=".2%"), alt.Tooltip("runs:Q"),
        alt.Tooltip("training:Q", format=".3f"), alt.Tooltip("inference:Q", format=".3f"),
    ]  # fmt: skip
    base = alt.Chart(alt.Data(values=shown)).encode(x=place, color=colour, detail="curve:N")
    layers = [
        base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", title=None), y2="high:Q"),
        base.mark_line(opacity=0.7).encode(y=y),
        base.mark_point(filled=True, size=70, opacity=1).encode(y=y, tooltip=tooltip),
    ]
    dense = [point for point in points if point["dense"]]
    if dense and x == "sparsity":
        level = alt.Chart(alt.Data(values=dense)).mark_rule(strokeDash=[5, 4])
        layers.append(level.encode(y=y, color=colour, tooltip=tooltip))
    return alt.layer(*layers).properties(width="container", height=320)
