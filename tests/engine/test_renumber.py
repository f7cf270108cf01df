"""New numbers for channels: the same results from fewer words."""

import pytest
import torch
from torch import nn

from granet.engine import inference
from granet.engine.renumber import MOST_CHANNELS, fill, grouped, renumbered, words
from granet.engine.spec import Spec
from granet.engine.steps import Add, Convolution, Input, MaxPool, Segment, Value


def layer(source, outputs, weight, groups=1, residual=None):
    kernel = tuple(weight.shape[2:])
    spec = Spec(in_channels=source.channels, out_channels=outputs, kernel=kernel, groups=groups)
    inputs = [source] if residual is None else [source, residual]
    return Convolution(Value(1, outputs, (4, 4), ()), inputs, spec=spec, weight=weight, bias=torch.randn(outputs))


def scattered(outputs, inputs, kernel=1):
    """A weight in which the channels i and i + inputs / 2 are active together, so that neighbours never are."""
    half = torch.rand(outputs, inputs // 2, kernel, kernel) < 0.2
    return torch.randn(outputs, inputs, kernel, kernel) * torch.cat([half, half], dim=1)


def chain():
    """An input, and three layers: only the channels between them are free."""
    start = Input(Value(1, 8, (4, 4), ()), [])
    first = layer(start.out, 16, scattered(16, 8))
    second = layer(first.out, 16, scattered(16, 16))
    third = layer(second.out, 8, scattered(8, 16))
    return Segment(1, [start, first, second, third], [third.out])


def test_channels_between_layers_are_renumbered_and_those_outside_are_not():
    segment = chain()
    orders = renumbered(segment, 2)
    assert set(orders) == {step.out for step in segment.steps[1:3]}
    assert all(order.sort().values.tolist() == list(range(16)) for order in orders.values())
    assert fill(segment.layers[1:], {}, 2) < 0.6
    assert fill(segment.layers[1:], orders, 2) == 1.0  # each channel lies beside its twin


@pytest.mark.parametrize("case", ["grouped", "pattern", "odd", "large"])
def test_what_keeps_its_numbers(case):
    segment = chain()
    if case == "grouped":
        segment.steps[2].spec = Spec(in_channels=16, out_channels=16, groups=4)
        segment.steps[2].weight = torch.randn(16, 4, 1, 1)
    elif case == "pattern":
        for step in segment.steps[1:]:
            step.weight = torch.ones_like(step.weight)
    elif case == "odd":
        for step in segment.steps[1:3]:
            step.out.channels = 15
    else:
        for step in segment.steps[1:3]:
            step.out.channels = MOST_CHANNELS + 4
    assert renumbered(segment, 4) == {}


def test_sums_and_pools_number_their_values_alike():
    start = Input(Value(1, 8, (4, 4), ()), [])
    first = layer(start.out, 16, scattered(16, 8))
    pooled = MaxPool(Value(1, 16, (4, 4), ()), [first.out])
    second = layer(pooled.out, 16, scattered(16, 16))
    total = Add(Value(1, 16, (4, 4), ()), [pooled.out, second.out])
    depthwise = layer(total.out, 16, torch.randn(16, 1, 3, 3), groups=16)
    last = layer(depthwise.out, 8, scattered(8, 16), residual=None)
    segment = Segment(1, [start, first, pooled, second, total, depthwise, last], [last.out])
    orders = renumbered(segment, 2)
    alike = [step.out for step in (first, pooled, second, total, depthwise)]
    assert set(orders) == set(alike) and all(torch.equal(orders[v], orders[alike[0]]) for v in alike)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_grouping_never_needs_more_words_than_random_numbers_do(size, density):
    active = torch.rand(200, 32) < density
    order = grouped(active, size)
    assert order.sort().values.tolist() == list(range(32))
    assert words(active[:, order], size) <= words(active[:, torch.randperm(32)], size)


def test_grouping_finds_hidden_blocks():
    blocks = (torch.rand(300, 16) < 0.1).repeat_interleave(4, dim=1)
    mixed = blocks[:, torch.randperm(64)]
    assert words(mixed[:, grouped(mixed, 4)], 4) == words(blocks, 4)


def test_columns_that_share_equally_much_are_paired():
    active = torch.ones(3, 6, dtype=torch.bool)
    assert grouped(active, 2).sort().values.tolist() == list(range(6))
    with pytest.raises(ValueError, match="6 columns cannot form groups of 4"):
        grouped(active, 4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_compiled_model_computes_the_same_and_reports_the_fill(always, precision):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for i in (2, 6):
            model[i].weight.copy_(scattered(*model[i].weight.shape[:3]))
    images = torch.rand(8, 3, 16, 16)
    calibration = [images] if precision == "int8" else None
    fast = inference.compile(model, images, precision=precision, calibration=calibration)
    report = fast.report()
    assert report.chosen == "sparse"
    assert report.fill[1] > 1.1 * report.fill[0]
    assert "before channels were renumbered" in str(report)
    gap = fast(images) - model(images)
    assert gap.norm() < 0.1 * model(images).norm()
    with torch.no_grad():
        for module in (model[2], model[6]):
            module.weight.mul_(-0.7)
    fast(images)  # notices the new weights; the next call packs them
    gap = fast(images) - model(images)
    assert gap.norm() < 0.1 * model(images).norm()
