"""Feather beside a naive version of it: a loop with its own autograd function, and scores in plain sorts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import granet
from granet import Feather, Sparsifier

STEPS, END = 40, 20


class Threshold(torch.autograd.Function):
    """The operator, with |w| in front of the root; gradients pass straight through, those of pruned weights by theta.

    Rounding as in granet, because the root is steep right above the threshold, and there enlarges every difference.
    """

    @staticmethod
    def forward(ctx, weight, threshold, p, theta):
        ctx.factor = torch.ones_like(weight).where(weight.abs() > threshold, theta)
        inside = 1 - (weight.new_tensor(threshold) / weight.abs()) ** p
        return torch.where(inside > 0, weight * inside.clamp(min=0) ** (1 / p), 0.0)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None, None, None


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.Tanh(), nn.Linear(20, 3)
    )
    return model.to(dtype)


def batch(step):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 8, 8, generator=rng).double(), torch.randint(0, 3, (16,), generator=rng)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-3)


def naive(sparsity, p, theta):
    """Weights, masks and effective weights after each step: all thresholds from one sort of all weights."""
    model = network()
    names = [name for name, w in model.named_parameters() if w.ndim > 1]
    weights = dict(model.named_parameters())
    optimizer, threshold = sgd(model.parameters()), 0.0
    total = sum(weights[name].numel() for name in names)
    for t in range(1, STEPS + 1):
        x, y = batch(t)
        effective = {name: Threshold.apply(weights[name], threshold, p, theta) for name in names}
        F.cross_entropy(torch.func.functional_call(model, effective, (x,)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        s = sparsity * (1 - (1 - min(t / END, 1)) ** 3)
        pruned = total - math.floor(total * (1 - s) + 0.5)
        sizes = torch.cat([weights[name].detach().abs().flatten() for name in names]).sort().values
        threshold = sizes[pruned - 1].item() if pruned else 0.0
        masks = {name: weights[name].detach().abs() > threshold for name in names}
        values = {name: Threshold.apply(weights[name], threshold, p, theta).detach() for name in names}
        yield t, threshold, weights, masks, values, optimizer


@pytest.mark.parametrize(
    ("settings", "theta"),
    [({"sparsity": 0.9}, 1.0), ({"sparsity": 0.96}, 0.5), ({"sparsity": 0.8, "p": 1.0, "theta": 0.7}, 0.7)],
)
def test_forty_steps_are_those_of_the_naive_loop_to_the_bit(settings, theta):
    model = network()
    method = Feather(end=END, **settings)
    sparsifier = Sparsifier(model, method)
    optimizer = sgd(model.parameters())
    sparsifier.attach(optimizer)
    own, came_back, was = dict(model.named_parameters()), 0, {}
    for t, threshold, weights, masks, values, other in naive(method.sparsity, method.p, theta):
        x, y = batch(t)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, mask in masks.items():
            module = model.get_submodule(name.rpartition(".")[0])
            assert torch.equal(sparsifier.masks[name], mask), (t, name)
            assert module.threshold.item() == threshold
            assert torch.equal(module.weight, values[name])
            came_back += int((mask & ~was.get(name, mask)).sum())
        for name, weight in weights.items():
            assert torch.equal(own[name], weight), (t, name)
            assert torch.equal(optimizer.state[own[name]]["momentum_buffer"], other.state[weight]["momentum_buffer"])
        was = masks
    assert came_back > 10  # what was pruned trains on, and returns
    assert abs(sparsifier.sparsity - method.sparsity) < 1e-3


@pytest.mark.parametrize(("p", "theta"), [(1.0, 0.3), (3.0, 0.5), (3.0, 1.0), (50.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_formula(p, theta, dtype):
    method = Feather(sparsity=0.8, end=1, p=p, theta=theta)
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(1), dtype=dtype, requires_grad=True)
    masks = method.update(1, {"w": granet.criterion.Layer(weight.detach())}, {"w": weight > 9}, torch.Generator())
    companions = method.companions({"w": granet.criterion.Layer(weight.detach())}, masks)["w"]
    threshold = companions["threshold"].item()
    assert threshold == weight.detach().abs().flatten().sort().values[480 - 1].item()
    value, upstream = method.effective(weight, **companions), torch.randn_like(weight)
    for w, v in zip(weight.flatten().tolist(), value.flatten().tolist(), strict=True):
        expected = math.copysign((abs(w) ** p - threshold**p) ** (1 / p), w) if abs(w) > threshold else 0.0
        assert v == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-10)
    assert not value[~masks["w"]].any() and value[masks["w"]].all()
    (value * upstream).sum().backward()
    assert torch.equal(weight.grad, torch.where(masks["w"], upstream, theta * upstream))


def test_without_a_threshold_the_network_computes_with_its_weights_to_the_bit():
    model, plain = network(torch.float32), network(torch.float32)
    with torch.no_grad():
        for one in (model, plain):
            one[4].weight[3:5, ::2] = 0.0
            one[4].weight[6] *= 1e-30  # their cubes are no numbers of 32 bits any more
    Sparsifier(model, Feather(sparsity=0.9, end=10))
    x = batch(0)[0].float()
    assert torch.equal(model(x), plain(x))
    for one in (model, plain):
        one(x).square().sum().backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )  # zeros included


def test_gradients_scale_by_half_above_95_per_cent_unless_said_otherwise():
    factors = {s: Feather(sparsity=s, end=1)._theta for s in (0.5, 0.95, 0.951, 0.99)}
    assert factors == {0.5: 1.0, 0.95: 1.0, 0.951: 0.5, 0.99: 0.5}
    assert Feather(sparsity=0.99, end=1, theta=0.9)._theta == 0.9
    with pytest.raises(ValueError, match=r"Feather: p=0.5 must be a finite number of at least 1"):
        Feather(sparsity=0.9, end=1, p=0.5)
    with pytest.raises(ValueError, match=r"Feather: theta=1.5 is outside \[0, 1\]"):
        Feather(sparsity=0.9, end=1, theta=1.5)


def test_a_step_costs_two_sparse_passes_and_a_dense_gradient():
    model = network(torch.float32)
    sparsifier = Sparsifier(model, Feather(sparsity=0.9, end=1))
    optimizer = sgd(model.parameters())
    sparsifier.attach(optimizer)
    x, y = batch(1)
    F.cross_entropy(model(x.float()), y).backward()
    optimizer.step()
    flops = granet.flops.count(model, torch.ones(1, 1, 8, 8))
    cost = flops.training_step(sparsifier.counts, trained=sparsifier.trained)
    assert cost == 2 * flops.inference(sparsifier.counts) + flops.inference()
    assert cost == flops.training_step(sparsifier.counts, dense_gradient=True)
    assert all(places.all() for places in sparsifier.trained.values())


def test_layers_of_several_kinds_of_numbers_share_the_threshold():
    layers = {
        "a": granet.criterion.Layer(torch.tensor([0.5, -0.25, 2.0])),
        "b": granet.criterion.Layer(torch.tensor([0.75, -3.0, 0.125], dtype=torch.bfloat16)),
    }
    method = Feather(sparsity=0.5, end=1)
    masks = method.update(1, layers, {name: layer.weight > 9 for name, layer in layers.items()}, torch.Generator())
    companions = method.companions(layers, masks)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, False, True],
        "b": [True, True, False],
    }
    assert {name: (c["threshold"].item(), c["threshold"].dtype) for name, c in companions.items()} == {
        "a": (0.5, torch.float32),
        "b": (0.5, torch.bfloat16),
    }
