import pytest

from granet.charts import POINTS, of
from granet.report import RunData

LAYERS = [{"name": "a", "total": 10, "active": 4}, {"name": "b", "total": 90, "active": 6}]


def run(*, epochs: int = 3, sparsity: float = 0.9, updates: bool = True, finished: bool = True) -> RunData:
    records = []
    for epoch in range(1, epochs + 1):
        at = {"step": 10 * epoch, "epoch": float(epoch)}
        records.append({"kind": "train", "loss": 1 / epoch, "accuracy": 1 - 1 / epoch, **at})
        values = {"loss": 2 / epoch, "accuracy": 0.5, "sparsity": sparsity, "realised_sparsity": sparsity}
        records.append({"kind": "eval", **at, **values})
        if updates:
            moved = {"grown": {"a": 1, "b": 2}, "dropped": {"a": 1, "b": 2}, "active": {"a": 4, "b": 6}}
            records.append({"kind": "update", "regeneration": 0.5, "exploration": 0.6, **at, **moved})
    summary = {"name": "x", "sparsity": sparsity, "layers": LAYERS} if finished else None
    return RunData(None, "", {}, tuple(records), summary)


def specs(**runs: RunData) -> dict[str, dict]:
    return {title: chart.to_dict() for title, _, _, chart in of(runs, dict.fromkeys(runs, "#123456"))}


def values(spec: dict) -> list[dict]:
    return next(part["data"]["values"] for part in (spec, *spec.get("layer", ())) if "values" in part.get("data", {}))


def test_a_chart_is_drawn_of_what_there_is():
    both = {"Accuracy", "Loss"}
    assert specs(dense=run(sparsity=0.0, updates=False)).keys() == both
    static = specs(static=run(updates=False))
    assert static.keys() == both | {"Sparsity", "Density of the layers at the end"}
    assert len(specs(granet=run())) == 8
    assert "Density of the layers at the end" not in specs(granet=run(finished=False))
    assert "Density of the layers over training" in specs(granet=run(finished=False))


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
