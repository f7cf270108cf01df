import json
import re

import pytest

from granet.report import charts
from granet.report.charts import POINTS, run_charts
from granet.report.rundata import RunData

LAYERS = [{"name": "a", "total": 10, "active": 4}, {"name": "b", "total": 90, "active": 6}]


def run(*, epochs: int = 3, sparsity: float = 0.9, updates: bool = True, finished: bool = True) -> RunData:
    records = []
    for epoch in range(1, epochs + 1):
        at = {"step": 10 * epoch, "epoch": float(epoch)}
        records.append({"kind": "train", "lr": 0.1 / epoch, "loss": 1 / epoch, "accuracy": 1 - 1 / epoch, **at})
        values = {"loss": 2 / epoch, "accuracy": 0.5, "sparsity": sparsity, "realised_sparsity": sparsity}
        records.append({"kind": "eval", **at, **values})
        if updates:
            moved = {"grown": {"a": 1, "b": 2}, "dropped": {"a": 1, "b": 2}, "active": {"a": 4, "b": 6}}
            records.append({"kind": "update", "regeneration": 0.5, "exploration": 0.6, **at, **moved})
    last = {"test_accuracy": 0.5, "test_accuracy_per_class": [0.75, 0.25, None]}
    summary = {"name": "x", "sparsity": sparsity, "layers": LAYERS, "best": None, "last": last} if finished else None
    return RunData(None, "", {}, tuple(records), summary)


def specs(**runs: RunData) -> dict[str, dict]:
    return {title: chart.to_dict() for title, _, _, chart in run_charts(runs, dict.fromkeys(runs, "#123456"))}


def values(spec: dict) -> list[dict]:
    return next(part["data"]["values"] for part in (spec, *spec.get("layer", ())) if "values" in part.get("data", {}))


def test_a_chart_is_drawn_of_what_there_is():
    all_have = {"Accuracy", "Loss", "Learning rate", "Accuracy by class"}
    assert specs(dense=run(sparsity=0.0, updates=False)).keys() == all_have
    static = specs(static=run(updates=False))
    assert static.keys() == all_have | {"Sparsity", "Density of the layers at the end"}
    assert len(specs(granet=run())) == 10
    assert "Density of the layers at the end" not in specs(granet=run(finished=False))
    assert "Density of the layers over training" in specs(granet=run(finished=False))


def test_a_short_run_stays_in_the_picture_beside_a_long_one():
    long = run(epochs=40)
    records = tuple(r | {"accuracy": 0.9} if r["kind"] == "eval" else r for r in long.records)
    long = RunData(None, "", {}, tuple(r | {"accuracy": 0.95} if "accuracy" in r else r for r in records), long.summary)

    def bounds(**runs):
        text = json.dumps(specs(**runs)["Accuracy"])
        return re.findall(r'"domain": (\[[\d.]+, 1\])', text)

    assert bounds(short=run(), long=long) == bounds(long=long, short=run()) == ["[0.0, 1]"] * 2


def test_a_curve_of_a_single_evaluation_shows_its_point():
    def alone(**runs):
        return {(point["run"], point["of"]): point["alone"] for point in values(specs(**runs)["Accuracy"])}

    assert alone(long=run()) == {("long", "training"): False, ("long", "validation"): False}
    once = RunData(None, "", {}, run().records[:4], run().summary)  # an update and a second batch, one evaluation
    assert alone(long=run(), once=once) == {
        ("long", "training"): False, ("long", "validation"): False,
        ("once", "training"): False, ("once", "validation"): True,
    }  # fmt: skip
    dots = specs(once=once)["Accuracy"]["layer"][1]["encoding"]["opacity"]
    assert {"test": "datum.alone", "value": 0.9} in dots["condition"] and dots["value"] == 0


def test_the_learning_rate_and_the_classes_are_those_of_the_files():
    found = specs(granet=run(), unfinished=run(finished=False))
    rates = [point["lr"] for point in values(found["Learning rate"]) if point["run"] == "granet"]
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3])
    points = [(point["run"], point["class"], point["accuracy"]) for point in values(found["Accuracy by class"])]
    assert points == [("granet", 0, 0.75), ("granet", 1, 0.25)]  # the third class has no image
    best = run()
    best.summary["best"] = {"test_accuracy": 0.6}  # of a version that did not count classes
    assert "Accuracy by class" not in specs(best=best)


def test_churn_is_the_share_of_active_weights_that_grew():
    assert [point["churn"] for point in values(specs(granet=run())["Churn"])] == pytest.approx([0.3] * 3)


def test_densities_are_those_of_the_layers():
    spec = specs(granet=run())
    bars = {bar["layer"]: bar["density"] for bar in values(spec["Density of the layers at the end"])}
    assert bars == pytest.approx({"a": 0.4, "b": 6 / 90})
    cells = values(spec["Density of the layers over training"])
    assert {(cell["layer"], cell["from"], cell["to"]) for cell in cells} == {
        (layer, at, end) for layer in "ab" for at, end in ((1, 2), (2, 3), (3, 3))
    }


def test_a_long_run_is_thinned_by_averaging():
    epochs = 2 * POINTS
    points = [
        point for point in values(specs(long=run(epochs=epochs, updates=False))["Loss"]) if point["of"] == "training"
    ]
    assert len(points) <= POINTS // 2
    assert points[0]["loss"] == pytest.approx(sum(1 / epoch for epoch in range(1, 5)) / 4)
    assert points[0]["epoch"] == pytest.approx(2.5)


def test_a_sweep_is_drawn_against_sparsity_and_training_flops():
    points = [
        {"task": task, "method": method, "curve": method, "accuracy": 0.9, "deviation": 0.01, "runs": 3,
         "sparsity": sparsity, "training": 2 * (1 - sparsity), "inference": 1 - sparsity, "dense": not sparsity}
        for task in ("a", "b") for method, sparsity in (("dense", 0.0), ("rigl", 0.9), ("rigl", 0.98))
    ]  # fmt: skip
    drawn = list(charts.sweep_charts(points, {"dense": "#888888", "rigl": "#ff0000"}, select="best"))
    assert [title[0] for title, *_ in drawn] == ["a", "a", "b", "b"]
    assert drawn[0][0] == "a: test accuracy, best weights"
    sparsity, training = (chart.to_dict() for *_, chart in drawn[:2])
    shown = (
        next(iter(sparsity["datasets"].values())) if "datasets" in sparsity else sparsity["layer"][0]["data"]["values"]
    )
    assert [(point["low"], point["high"]) for point in shown] == [(0.89, 0.91)] * 2  # dense is a level, not a point
    assert len(sparsity["layer"]) == len(training["layer"]) + 1
    low, high = training["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert low < 2 * 0.02 < 2 < high


def test_methods_have_colours_of_their_own_however_many():
    assert charts.colours(3) == list(charts.COLOURS[:3])
    for count in (8, 9, 22, 40):
        assert len(set(charts.colours(count))) == count
