"""Memory formats and autocast of accelerated training: what comes out, and what a plan is compared with."""

import copy

import pytest
import torch
from small_models import problem
from torch import nn

import granet
from granet.engine import layer, timing
from granet.engine.training import accelerate

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_outputs_and_gradients_have_the_form_that_torch_gives_them(
    memory_format, autocast, bfloat16, always_sparse, monkeypatch
):
    if bfloat16 and not autocast:
        pytest.skip("bfloat16 planes are for autocast")
    monkeypatch.setattr(layer.Forward, "_choices", lambda *_: [layer.Planes(bfloat16=bfloat16)])
    torch.manual_seed(0)
    for make, shape in (
        (lambda: nn.Conv2d(6, 8, 3, padding=1), (4, 6, 7, 7)),
        (lambda: nn.Conv2d(6, 8, 1), (4, 6, 7, 7)),
        (lambda: nn.Conv2d(1, 8, 3, stride=2), (4, 1, 7, 7)),
        (lambda: nn.Linear(6, 8), (4, 6)),
        (lambda: nn.Conv1d(6, 8, 3), (4, 6, 9)),
    ):
        fast, x = make(), torch.randn(shape)
        if x.dim() == 4:
            x = x.to(memory_format=FORMATS[memory_format])
        sparsifier = granet.Sparsifier(fast, granet.Static(sparsity=0.6))
        dense = copy.deepcopy(fast)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert accelerate(sparsifier, x.requires_grad_()).report().layers[0].chosen == "sparse"
            outputs = [net(x) for net in (fast, dense)]
        gradients = []
        for y, net in zip(outputs, (fast, dense), strict=True):
            gradients.append(torch.autograd.grad(y.sum(), [x, net.weight, net.bias]))
            gradients[-1][1].mul_(sparsifier.masks["weight"])
        tolerance = {"atol": 0.1, "rtol": 0.02} if autocast else {"atol": 1e-4, "rtol": 1e-4}
        for found, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
            assert found.dtype == expected.dtype
            if found.shape != fast.weight.shape:  # its gradient lies as the weight does, which an optimizer wants
                assert found.stride() == expected.stride()
            torch.testing.assert_close(found, expected, **tolerance)


def test_the_plan_is_measured_as_the_loop_runs(always_sparse, caplog):
    model, x, _ = problem()
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = accelerate(sparsifier, x.to(memory_format=torch.channels_last))
        assert not caplog.records
    report = plan.report()
    assert report.setting == "bfloat16 autocast, channels_last" and report.setting in str(report)
    assert set(report.whole) == {"dense", "sparse"}
    expected = model(x)  # in float32, so the layers run dense, and that is reported once
    model(x)
    assert [record.getMessage() for record in caplog.records] == [
        "the model trains without autocast, and its plan was made under bfloat16 autocast: all layers run dense. "
        "Call granet.accelerate inside of the same torch.autocast as the training step"
    ]
    plan.remove()
    assert torch.equal(model(x), expected)


def _spread(ms):
    return timing.Spread(ms, ms, ms, 1)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_float32_the_faster_memory_format_is_the_baseline(memory_format, always_sparse, monkeypatch):
    model, x, _ = problem()
    before = [p.clone() for p in model.parameters()]
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.8))
    monkeypatch.setattr(timing, "NOISE", 0.0)
    times = {"dense": 3.0, "sparse": 2.0, "dense, other format": 1.0}
    monkeypatch.setattr(
        timing.Timings, "measure", lambda self, calls: [_spread(3.0), *[_spread(2.0)] * (len(calls) - 1)]
    )
    monkeypatch.setattr(
        "granet.engine.training.wall_times",
        lambda calls: {name: call() or _spread(times[name]) for name, call in calls.items()},
    )
    plan = accelerate(sparsifier, x.to(memory_format=FORMATS[memory_format]))
    report, other = plan.report(), next(name for name in FORMATS if name != memory_format)
    assert all(row.chosen == "dense" for row in report.layers) and report.whole_dense_ms == 1.0
    assert f"dense (float32, {other}) 1.00 ms" in report.why and f"sparse (float32, {memory_format})" in report.why
    assert f".to(memory_format=torch.{other.replace('contiguous', 'contiguous_format')})" in report.why
    masks = sparsifier.masks
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old * masks[name] if name in masks else old) and p.grad is None
