"""Figures of a study."""

import dataclasses
import re

from granet.lab.plasticity.page import figure, svg


def test_every_panel_shows_its_own_cells_where_others_are_missing(made_up, like_the_paper):
    whole = made_up(like_the_paper, noise=0.0)
    part = dataclasses.replace(
        whole, rows=tuple(row for row in whole.rows if (row.arm, row.pretrained_sparsity) != ("none", 0))
    )
    panels = figure(part).to_dict()["vconcat"]
    shown = [[panel["data"]["values"] for panel in row["hconcat"]] for row in panels]
    assert [[len(values) for values in row] for row in shown] == [[0, 24], [24, 24], [24, 24]]
    assert {(value["arm"], value["sparsity"]) for value in shown[1][0]} == {("restore", "0.0")}


def test_every_panel_labels_all_of_its_axis_of_points(made_up, like_the_paper):
    table = made_up(like_the_paper, noise=0.0)
    chart = figure(table)
    panels = len(table.arms) * len(table.sparsities)
    axis = chart.to_dict()["vconcat"][0]["hconcat"][0]["layer"][-1]["encoding"]["y"]["axis"]
    labels = [f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0" for value in axis["values"]]
    shown = re.findall(r'text-anchor="end"[^>]*>([^<]+)</text>', svg(chart))
    assert "0" in labels and {label: shown.count(label) for label in labels} == dict.fromkeys(labels, panels)
