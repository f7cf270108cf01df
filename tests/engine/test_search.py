"""What is chosen: the faster of dense and compiled, if both compute the same."""

import pytest
import torch
from small_models import close, sparse, wide
from torch import nn

from granet.engine import inference, search
from granet.engine.timing import Spread


def test_a_compiled_model_says_what_was_measured(always):
    model, x = wide(), torch.randn(1, 192, 28, 28)
    fast = inference.compile(model, x)
    report = fast.report()
    assert report.chosen == "sparse"
    assert report.fast_ms > 0 and report.dense_ms > 0
    assert [row.name for row in report.layers] == ["0", "3"]
    for row in report.layers:
        assert 0.01 < row.density < 0.03 and row.sparse_ms > 0 and row.dense_ms > 0
        assert (row.why == "faster") == (row.sparse_ms < row.dense_ms)
    assert "runs sparse" in str(report)
    assert report.nbytes < 192 * 192 * 9 * 2 * 4  # less than the dense weights
    torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_dense_model_stays_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    x = torch.randn(256, 512)
    fast = inference.compile(model, x)
    report = fast.report()
    assert report.fast_ms <= report.dense_ms
    torch.testing.assert_close(fast(x), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_outputs_that_differ_are_refused_also_where_the_example_shows_nothing(always, monkeypatch):
    """The kernels drop the bias here: with an example of zeros after a bias of zeros only random inputs show it."""
    whole = search.Program.run
    monkeypatch.setattr(search.Program, "run", lambda *args, **named: [y * 1.1 for y in whole(*args, **named)])
    model = sparse(nn.Sequential(nn.Linear(16, 8, bias=False)))
    fast = inference.compile(model, torch.zeros(4, 16))
    assert fast.report().chosen == "dense" and "differ" in fast.report().why
    x = torch.randn(4, 16)
    close(fast(x), model(x).detach())


@pytest.mark.parametrize(
    ("fast", "error", "chosen", "why"),
    [
        (Spread(1.0, 2.0, 3.0, 5), 1e-6, "sparse", "faster as a whole"),
        (Spread(1.0, 6.0, 9.0, 5), 1e-6, "dense", "is not faster: it took 1.00 ms (median 6.00, longest 9.00)"),
        (Spread(1.0, 2.0, 3.0, 5), 1e-2, "dense", "differ by 1.0e-02"),
        (Spread(1.0, 2.0, 3.0, 5), float("nan"), "dense", "differ by nan"),
    ],
)
def test_a_verdict_needs_the_shortest_time_the_median_and_equal_outputs(fast, error, chosen, why):
    report = search.verdict([], Spread(5.0, 5.0, 5.0, 5), fast, error, (100, 200), 1e-3)
    assert report.chosen == chosen and why in report.why
    assert (report.fast_ms, report.nbytes) == ((1.0, 100) if chosen == "sparse" else (5.0, 0))


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([float("inf"), 2.0], [float("inf"), 1.0], 0.5),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("inf"), 2.0], [3.0, 2.0], float("inf")),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([1, 2], [1, 3], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_outputs_differ_by_the_largest_value(expected, found, difference):
    assert search.difference(torch.tensor(expected), {"y": torch.tensor(found)}) == difference
