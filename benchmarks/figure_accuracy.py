"""Draws accuracy against sparsity from the table in results/fashion-mnist.md.

    python benchmarks/figure_accuracy.py results/fashion-mnist.md results/figures/fashion-mnist.svg

The ground is transparent, and all text is of a grey that is readable on white and on dark pages.
"""

import argparse
import math
import re
from pathlib import Path

import altair

from granet.report.charts import COLOURS, DENSE_COLOUR

GREY = "#7d8590"
ROW = re.compile(
    r"^(?P<method>\S.*?) {2,}(?P<sparsity>\d+%)? +(?P<active>[\d,]+) +(?P<mean>[\d.]+) \+- (?P<deviation>[\d.]+)", re.M
)


def rows(text: str) -> list[dict]:
    """Returns a row for each line of the table: method, sparsity in %, mean and deviation of test accuracy in %.

    >>> rows("GMP   90%   27,030  89.19 +- 0.21  89.16 +- 0.26")
    [{'method': 'GMP', 'sparsity': '90%', 'accuracy': 89.19, 'low': 88.98, 'high': 89.4}]
    """
    return [
        {
            "method": row["method"],
            "sparsity": row["sparsity"] or "dense",
            "accuracy": float(row["mean"]),
            "low": round(float(row["mean"]) - float(row["deviation"]), 4),
            "high": round(float(row["mean"]) + float(row["deviation"]), 4),
        }
        for row in ROW.finditer(text)
    ]


def chart(found: list[dict]) -> altair.LayerChart:
    """Returns a curve for each method, with a bar for the deviation over seeds, and a dashed line for dense."""
    dense = [row for row in found if row["sparsity"] == "dense"]
    sparse = [row for row in found if row["sparsity"] != "dense"]
    methods = list(dict.fromkeys(row["method"] for row in sparse))
    colours = dict(zip(methods, ("#8a94a3", *COLOURS[1:]), strict=False))
    colours |= dict.fromkeys(methods[-1:], COLOURS[0])  # GraNet as the paper proposes it
    methods.sort(key=lambda method: -next(row["accuracy"] for row in reversed(sparse) if row["method"] == method))
    colour = altair.Color(
        "method:N", sort=methods, title=None,
        scale=altair.Scale(domain=methods, range=[colours[method] for method in methods]),
        legend=altair.Legend(symbolType="circle", symbolOpacity=1),
    )  # fmt: skip
    sparsities = list(dict.fromkeys(row["sparsity"] for row in sparse))
    middle = (len(methods) - 1) / 2
    points = [  # side by side, so that none hides another
        row | {"at": sparsities.index(row["sparsity"]) + 0.025 * (methods.index(row["method"]) - middle)}
        for row in sparse
    ]
    base = altair.Chart(altair.Data(values=points)).encode(
        x=altair.X(
            "at:Q", title="share of weights that are zero",
            scale=altair.Scale(domain=[-0.25, len(sparsities) - 0.75], nice=False),
            axis=altair.Axis(values=list(range(len(sparsities))), labelExpr=f"{sparsities}[datum.value]", ticks=False),
        ),
        color=colour,
    )  # fmt: skip
    domain = [math.floor(min(row["low"] for row in found)), math.ceil(max(row["high"] for row in found))]
    y = altair.Y("accuracy:Q", title="test accuracy, %", scale=altair.Scale(domain=domain))
    level = altair.Chart(altair.Data(values=dense))
    return altair.layer(
        level.mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color=DENSE_COLOUR).encode(y=y),
        level.mark_text(text="dense", align="left", dx=6, dy=-9, x=0, color=GREY, fontSize=14).encode(y=y),
        base.mark_line(opacity=0.6, strokeWidth=2.5).encode(y=y),
        base.mark_rule(strokeWidth=2).encode(y=altair.Y("low:Q"), y2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(y=y),
    ).properties(width=520, height=300, background="transparent")


def style(drawn: altair.LayerChart) -> altair.LayerChart:
    """Returns the chart with its text and lines in grey."""
    font = {"labelFontSize": 14, "titleFontSize": 14, "labelColor": GREY, "titleColor": GREY}
    return (
        drawn.configure(font="sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            **font, titleFontWeight="normal", gridColor=GREY, gridOpacity=0.2, domainColor=GREY, tickColor=GREY
        )
        .configure_axisX(grid=False, labelAngle=0)
        .configure_legend(**font, rowPadding=6)
    )


def main() -> None:
    """Reads the table and writes the figure that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="Markdown file with the table")
    parser.add_argument("figure", type=Path, help="file to write, SVG or PNG")
    arguments = parser.parse_args()
    found = rows(arguments.table.read_text())
    if not found:
        raise SystemExit(f"{arguments.table} has no row of the form: method, sparsity, active, mean +- deviation")
    style(chart(found)).save(str(arguments.figure))


if __name__ == "__main__":
    main()
