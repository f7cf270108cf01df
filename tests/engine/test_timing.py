"""What a time is, and when one call is the faster of two."""

import pytest
import torch
from torch import nn

import granet
from granet.engine import timing, training
from granet.engine.timing import Spread


def test_a_spread_is_in_milliseconds():
    spread = Spread.from_seconds([0.004, 0.001, 0.002])
    assert (spread.least, spread.median, spread.most, spread.runs) == (1.0, 2.0, 4.0, 3)
    assert str(spread) == "1.00 ms (median 2.00, longest 4.00)"


@pytest.mark.parametrize(
    ("least", "median", "faster"),
    [(8.0, 9.0, True), (8.0, 10.0, False), (8.0, 9.9, False), (9.9, 9.0, False), (9.0, 30.0, False)],
)
def test_the_faster_call_wins_by_its_shortest_time_and_by_its_median(least, median, faster):
    assert Spread(least, median, 40.0, 5).is_faster_than(Spread(10.0, 10.0, 10.0, 5)) == faster


def test_calls_take_turns_and_alike_ones_are_measured_once():
    order = []
    timings = timing.Timings()
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    first = timings.measure(calls)
    assert order[:6] == ["a", "b"] * 3 and order.count("a") == order.count("b") == first[0].runs + 1
    count = len(order)
    assert timings.measure(calls) == first and len(order) == count
    timings.clear()
    timings.measure(calls)
    assert len(order) > count


def test_layers_whose_median_is_slower_run_dense(always_sparse, monkeypatch):
    """On a busy machine a kernel can have the shortest time once, and be the slower one as a rule."""
    monkeypatch.setattr(timing, "NOISE", 0.03)

    def measure(self, calls):
        found = {"dense": Spread(5.0, 6.0, 7.0, 5)}
        return [found.get(key[-1], Spread(1.0, 9.0, 20.0, 5)) for key in calls]

    monkeypatch.setattr(timing.Timings, "measure", measure)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = granet.accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.6)), torch.randn(4, 8))
    assert [row.chosen for row in plan.report().layers] == ["dense", "dense"]


def test_a_model_whose_median_is_slower_runs_dense(monkeypatch):
    monkeypatch.setattr(
        timing.Timings,
        "measure",
        lambda self, calls: [Spread(*[9.0 if key[-1] == "dense" else 1.0] * 3, 1) for key in calls],
    )
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = granet.accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.6)), torch.randn(4, 8))
    whole = {"dense": Spread(5.0, 5.0, 5.0, 5), "sparse": Spread(1.0, 15.0, 15.0, 5)}
    monkeypatch.setattr(training, "wall_times", lambda calls: {name: whole[name] for name in calls})
    plan.replan()
    report = plan.report()
    assert report.whole == whole
    assert [row.chosen for row in report.layers] == ["dense", "dense"]
    assert "nothing wins, all layers run dense" in report.why
