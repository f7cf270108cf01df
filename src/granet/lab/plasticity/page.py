"""The figures of a study, as in the paper (one column per pretrained sparsity, one row per arm), and its page."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granet.lab.plasticity.findings import findings, paragraph
from granet.lab.plasticity.study import ARMS
from granet.lab.plasticity.table import MEASURES, Measure, Table
from granet.report import charts
from granet.report import page as report
from granet.train import checkpoint

if TYPE_CHECKING:
    import altair

TITLES = {"plasticity": "Pruning plasticity", "final_gap": "Final performance gap"}


def figure(table: Table, measure: Measure = "plasticity") -> "altair.VConcatChart":
    """Returns a figure: points of accuracy against the epoch of pruning, one curve per pruning rate; drops are dashed.

    Raises:
        ModuleNotFoundError: Altair is not installed; the message says how to.
        ValueError: there is no such measure, or there are no rows.
    """
    if measure not in MEASURES:
        raise ValueError(f"there is no measure {measure!r}: choose from {', '.join(MEASURES)}")
    if not table.rows:
        raise ValueError("there are no rows to draw: no cell of the study is made yet")
    try:
        import altair as alt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a figure needs altair: pip install "granet[train]"') from error
    points = _points(table, measure)
    values = [point[key] for point in points for key in ("low", "high")]
    at = {(sparsity, arm): [] for arm in table.arms for sparsity in table.sparsities}
    for point in points:
        at[float(point["sparsity"]), point["arm"]].append(point)
    panels = [[_panel(table, at[s, arm], arm, s, values) for s in table.sparsities] for arm in table.arms]
    # a facet by row and column would shift the panels where a combination has no cell yet
    return alt.vconcat(*(alt.hconcat(*row) for row in panels)).resolve_scale(color="shared")


def _panel(table: Table, points: list[dict], arm: str, sparsity: float, values: list[float]) -> "altair.LayerChart":
    import altair as alt

    rates = [f"{rate:g}" for rate in table.rates]
    x = alt.X(
        "epoch:Q", title="epoch of pruning" if arm == table.arms[-1] else None,
        scale=alt.Scale(domain=[0, table.epochs], nice=False), axis=alt.Axis(grid=False, tickCount=5),
    )  # fmt: skip
    # differences of half a point and of fifty are both to be seen
    labelled = ticks(values)
    scale = alt.Scale(type="symlog", constant=1, domain=[labelled[0], labelled[-1]], nice=False)
    label = "datum.value ? format(datum.value, '+~g') : '0'"
    axis = alt.Axis(values=labelled, labelExpr=label, labelOverlap=False)
    title = f"{arm}: points of accuracy" if sparsity == table.sparsities[0] else None
    colours = alt.Scale(domain=rates, range=list(charts.COLOURS[: len(rates)]))
    tooltip = [
        alt.Tooltip("sparsity:N", title="pretrained sparsity"), alt.Tooltip("arm:N"), alt.Tooltip("rate:N"),
        alt.Tooltip("epoch:Q"), alt.Tooltip("lr:N"), alt.Tooltip("mean:Q", format="+.2f"),
        alt.Tooltip("low:Q", format="+.2f"), alt.Tooltip("high:Q", format="+.2f"), alt.Tooltip("seeds:Q"),
    ]  # fmt: skip
    legend = alt.Legend(title="pruning rate", orient="top", direction="horizontal", symbolOpacity=1)
    base = alt.Chart().encode(x=x, color=alt.Color("rate:N", sort=rates, scale=colours, legend=legend))
    y = alt.Y("mean:Q", title=title, scale=scale, axis=axis)
    # all layers name the axis: one that does not brings its own back, which hides labels
    zero = alt.YDatum(0, type="quantitative", title=title, scale=scale, axis=axis)
    layers = [alt.Chart().mark_rule(opacity=0.5).encode(y=zero)]
    layers += [alt.Chart().mark_rule(strokeDash=[4, 3], opacity=0.6).encode(x=alt.datum(at)) for at in table.drops]
    if len(table.seeds) > 1:
        layers.append(
            base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=title, scale=scale, axis=axis), y2="high:Q")
        )
    layers += [base.mark_line().encode(y=y), base.mark_point(filled=True, size=28).encode(y=y, tooltip=tooltip)]
    head = f"pretrained sparsity {sparsity:g}" if arm == table.arms[0] else ""
    width = max(110, min(230, 900 // len(table.sparsities)))
    return alt.layer(*layers, data=alt.Data(values=points)).properties(width=width, height=150, title=head)


TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def ticks(values: Sequence[float]) -> list[float]:
    """Returns what is labelled on an axis of points in symlog scale: zero, both ends, and what has room between them.

    >>> ticks([-0.3, 0.8]), ticks([2, 31])
    ([-0.5, -0.2, 0, 0.2, 0.5, 1], [0, 2, 5, 10, 20, 50])
    """
    low, high = (
        next((tick for tick in TICKS if tick >= size), TICKS[-1]) if size > 0 else 0
        for size in (-min(values), max(values))
    )
    ends = {-low, high} if low or high else {TICKS[0]}
    room = (math.log1p(low) + math.log1p(high)) / 8
    found = sorted({0, *ends})
    for tick in (sign * size for size in reversed(TICKS) for sign in (-1, 1)):
        away = (abs(math.copysign(math.log1p(abs(tick)), tick) - math.copysign(math.log1p(abs(x)), x)) for x in found)
        if -low < tick < high and min(away) >= room:
            found.append(tick)
    return sorted(found)


def _points(table: Table, measure: Measure) -> list[dict[str, Any]]:
    """Returns a point for each curve and moment: mean over seeds, and the least and greatest."""
    groups: dict[tuple, list] = defaultdict(list)
    for row in table.rows:
        groups[*row.curve, row.epoch, row.lr].append(100 * getattr(row, measure))
    return [
        {
            "sparsity": str(sparsity), "rate": f"{rate:g}", "arm": arm, "epoch": epoch, "lr": f"{lr:g}",
            "mean": statistics.fmean(values), "low": min(values), "high": max(values), "seeds": len(values),
        }
        for (sparsity, rate, arm, epoch, lr), values in groups.items()
    ]  # fmt: skip


def write(table: Table, out: str | Path) -> dict[str, Path]:
    """Returns the files written to ``out``: numbers, text with findings, figures and a page that needs only a browser.

    Raises:
        ModuleNotFoundError: the libraries that draw are not installed; numbers and text are written all the same.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = {"numbers": out / "plasticity.csv", "findings": out / "plasticity.md"}
    table.to_csv(written["numbers"])
    checkpoint.replace(written["findings"], markdown(table))
    for measure in MEASURES:
        written[TITLES[measure].lower()] = path = out / f"{measure.replace('_', '-')}.svg"
        checkpoint.replace(path, svg(figure(table, measure)))
    written["page"] = out / "plasticity.html"
    judged = findings(table)
    report.write_page(
        written["page"],
        title=f"{table.name}: pruning plasticity",
        headings=["finding", "verdict", "figures"],
        rows=[([one.claim, one.verdict, one.figures], _COLOUR[one.verdict]) for one in judged],
        colours={},
        prose=["verdict", "figures"],
        notes=[note.replace("`", "") for note in (paragraph(table), *(f"{arm}: {ARMS[arm]}." for arm in table.arms))],
        drawn=[(TITLES[measure], note, True, figure(table, measure)) for measure, note in MEASURES.items()],
    )
    return written


_COLOUR = {"holds": charts.COLOURS[2], "does not hold": charts.COLOURS[7], "undecided": charts.DENSE_COLOUR}


def svg(chart: "altair.TopLevelMixin") -> str:
    """Returns a chart as SVG on white ground.

    Raises:
        ModuleNotFoundError: vl-convert is not installed; the message says how to.
    """
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a figure as SVG needs vl_convert: pip install "granet[train]"') from error
    return vl_convert.vegalite_to_svg(json.dumps(chart.to_dict() | {"background": "white"}))


def markdown(table: Table) -> str:
    """Returns paragraph, findings and table of means as Markdown."""
    lines = [f"# {table.name}: pruning plasticity", "", paragraph(table), ""]
    if table.rows:
        lines += ["## The paper's findings, here", "", "| finding | verdict | figures |", "|---|---|---|"]
        lines += [f"| {one.claim} | **{one.verdict}** | {one.figures} |" for one in findings(table)]
        lines += ["", "Criteria:", ""] + [f"- {one.claim}: {one.criterion}" for one in findings(table)]
        lines += ["", "## Means over moments and seeds, points of accuracy", "", "```", str(table), "```"]
        mean = statistics.fmean(row.accuracy_unpruned for row in table.rows)
        seeds = ", ".join(map(str, table.seeds))
        lines += ["", f"Seeds {seeds}; k = {table.retrain:g} of {table.epochs} epochs; final accuracy of the unpruned "
                  f"networks {100 * mean:.2f} % on average; {table.tested:,} test images."]  # fmt: skip
        lines += [f"`{arm}`: {ARMS[arm]}." for arm in table.arms]
    return "\n".join(lines) + "\n"
