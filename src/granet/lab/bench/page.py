"""The page of `granet bench`: tables, and bars of latency, throughput, size and layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from granet.lab.bench.results import EXPLANATIONS, SideBySide
from granet.report import charts
from granet.report import page as report

if TYPE_CHECKING:
    import altair

LAYERS = 40  # the slowest ones are shown


def check(path: Path) -> None:
    """Refuses a page that could not be written, before any work is done.

    Raises:
        ModuleNotFoundError: the libraries that draw are not installed.
        ValueError: there is no such folder, or the name does not end in .html.
    """
    report.require()
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--page {path}: a page is an HTML file, whose name ends in .html")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--page {path}: there is no such folder")


def write(found: SideBySide, path: Path) -> Path:
    """Returns where the page was written; it needs nothing but a browser.

    Raises:
        ModuleNotFoundError: the libraries that draw are not installed.
    """
    names = [f"{row.engine} {row.precision}" for row in found.rows]
    engines = list(dict.fromkeys(row.engine for row in found.rows))
    shades = dict(zip(engines, charts.colours(len(engines)), strict=True)) | {"torch": charts.DENSE_COLOUR}
    colours = {name: shades[row.engine] for name, row in zip(names, found.rows, strict=True)}
    headings, *rows = found.cells()
    best = min(found.rows, key=lambda row: row.latency.least)
    tiles = [
        ("fastest", f"{best.latency.least:.2f} ms", str(best)),
        ("fastest dense engine", f"{found.fastest_dense.latency.least:.2f} ms", str(found.fastest_dense)),
    ]
    return report.write_page(
        path,
        title=f"{found.name}: speed",
        headlines=[(found.name, found.about, tiles)],
        headings=headings,
        explanations=EXPLANATIONS,
        rows=[(row, colours[name]) for row, name in zip(rows, names, strict=True)],
        notes=[found.verdict, found.machine, *found.notes(), *(found.layers.notes() if found.layers else ())],
        colours={},
        drawn=_drawn(found, names, colours),
    )


def _drawn(
    found: SideBySide, names: list[str], colours: dict[str, str]
) -> Iterator[tuple[str, str, bool, altair.TopLevelMixin]]:
    points = [
        {"name": name, "least": row.latency.least, "p50": row.latency.p50, "rate": row.rate,
         "size": row.nbytes / 1e6, "accuracy": row.accuracy}
        for name, row in zip(names, found.rows, strict=True)
    ]  # fmt: skip
    note = "milliseconds; bar: the shortest call, tick: the median"
    yield "Latency", note, False, _bars(points, "least", colours, ".3f", ticks=("p50",))
    streams = f", {found.streams} streams" if found.streams > 1 else ""
    yield "Throughput", f"examples per second{streams}", False, _bars(points, "rate", colours, ",.0f")
    yield "Size of the weights", "megabytes", False, _bars(points, "size", colours, ",.2f")
    if all(point["accuracy"] is not None for point in points):
        note = f"on {found.images:,} test images"
        yield "Accuracy", note, False, _bars(points, "accuracy", colours, ".2%")
    if found.layers is not None:
        slowest = sorted(found.layers.layers, key=lambda layer: -layer.ms)[:LAYERS]
        other = found.layers.pattern
        bars = [{"name": one.name, "time": one.ms, "other": one.other_ms} for one in slowest]
        note = f"milliseconds of each layer in granet, {found.layers.precision}, the slowest first"
        note += f"; tick: with as many weights in the pattern {other}" if other else ""
        colour = dict.fromkeys((bar["name"] for bar in bars), charts.COLOURS[0])
        yield "Layers", note, True, _bars(bars, "time", colour, ".3f", ticks=("other",) if other else ())


def _bars(
    points: list[dict], key: str, colours: dict[str, str], digits: str, ticks: tuple[str, ...] = ()
) -> altair.LayerChart:
    import altair as alt

    y = alt.Y("name:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.25), axis=alt.Axis(labelLimit=260))
    colour = alt.Color("name:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=None)
    base = alt.Chart().encode(y=y)
    bar = base.mark_bar(cornerRadiusEnd=2).encode(
        x=alt.X(f"{key}:Q", title=None, axis=alt.Axis(tickCount=5, format="~s" if digits != ".2%" else "~%")),
        color=colour,
        tooltip=["name:N", *(alt.Tooltip(f"{one}:Q", format=digits) for one in (key, *ticks))],
    )
    reach = "datum." + ", datum.".join((key, *ticks))  # the text stands to the right of the bar and its ticks
    text = base.transform_calculate(end=f"max({reach})").mark_text(align="left", dx=5, color="currentColor")
    text = text.encode(x="end:Q", text=alt.Text(f"{key}:Q", format=digits))
    marks = [base.mark_tick(thickness=2, opacity=0.8, color="currentColor").encode(x=f"{one}:Q") for one in ticks]
    chart = alt.layer(bar, *marks, text, data=alt.Data(values=points))
    return chart.properties(width="container", height=alt.Step(24))
