"""Cyclic sparsity beside a naive version of it, in NumPy, and the course of its density."""

import math

import numpy as np
import pytest
import torch

from granet import Cyclic, distribution
from granet.criterion import Layer
from granet.topology import count

SHAPES = {"first": (12, 5, 3, 3), "second": (40, 30), "head": (10, 40)}


def order(scores, among):
    """The candidates by falling score, the earlier of equals first."""
    return sorted(np.flatnonzero(among), key=lambda i: (-scores.flat[i], i))


def naive(method, step, weights, grads, masks):
    if step <= method.end:
        x = (step / (method.end / method.cycles)) % 1
        rise = (1 - math.cos(2 * math.pi * x)) / 2 if method.wave == "cosine" else min(2 * x, 2 - 2 * x)
        density = (1 - method.sparsity) * (1 + (method.peak - 1) * (rise if step < method.end else 0))
        counts = distribution.named(method.distribution)(SHAPES, density)
    after = {}
    for name, mask in masks.items():
        active, out = int(mask.sum()), mask.copy()
        by_size, by_slope = abs(weights[name]), abs(grads[name])
        n = counts[name] if step <= method.end else None
        if n is None:
            r = 0.005 + (method.drop_fraction - 0.005) * (1 + math.cos(math.pi * step / method.total)) / 2
            n = active - math.floor(round(r, 12) * active)
        if n < active:
            out.flat[order(by_size, mask)[n:]] = False
        missing = (n if step <= method.end else active) - int(out.sum())
        out.flat[order(by_slope, ~out)[:missing]] = True
        after[name] = out
    return after


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        Cyclic(sparsity=0.9, end=80, total=200, interval=10),
        Cyclic(sparsity=0.95, end=75, total=200, interval=10, cycles=3, peak=5.0, wave="triangular"),
        Cyclic(sparsity=0.8, end=40, total=120, interval=10, cycles=1, peak=2.0, distribution="uniform"),
    ],
    ids=str,
)
def test_a_whole_course_equals_the_naive_version(method, ties):
    rng = np.random.default_rng(3)

    def draw(shape):
        return (rng.integers(-4, 5, shape) if ties else rng.normal(size=shape)).astype(np.float32)

    masks = method.init({name: Layer(torch.zeros(shape)) for name, shape in SHAPES.items()}, torch.Generator())
    sizes = []
    for step in filter(method.is_update, range(1, method.total + 1)):
        weights = {name: draw(shape) * masks[name].numpy() for name, shape in SHAPES.items()}
        grads = {name: draw(shape) for name, shape in SHAPES.items()}
        expected = naive(method, step, weights, grads, {name: mask.numpy() for name, mask in masks.items()})
        layers = {n: Layer(torch.from_numpy(weights[n]), torch.from_numpy(grads[n])) for n in SHAPES}
        masks = method.update(step, layers, masks, torch.Generator())
        for name, mask in masks.items():
            assert mask.numpy().tolist() == expected[name].tolist(), (step, name)
        sizes.append(sum(map(count, masks.values())))
        assert sizes[-1] == distribution.budget(sum(map(math.prod, SHAPES.values())), 1 - method.sparsity_at(step))
    least, most = min(sizes), max(sizes)
    assert least == sizes[-1] == sum(method.final_counts(SHAPES).values())
    assert 0.8 * method.peak * least < most <= method.peak * least


def test_the_density_rises_and_falls_and_settles():
    method = Cyclic(sparsity=0.99, end=100, total=200, interval=7)
    density = [round(1 - method.sparsity_at(step), 6) for step in (0, 25, 50, 75, 100, 150)]
    assert density == [0.01, 0.03, 0.01, 0.03, 0.01, 0.01]
    assert method.is_update(100) and method.is_update(196) and not method.is_update(200)
    assert method.regeneration_at(100) == method.regeneration_at(200) == 0 < method.regeneration_at(101)
    assert method.candidates(98, 50) is None and method.candidates(101, 50) == 12


def test_what_has_no_gradient_does_not_grow():
    method = Cyclic(sparsity=0.9, end=80, total=200, interval=10)
    rng = torch.Generator().manual_seed(0)
    layers = {name: Layer(torch.randn(shape, generator=rng)) for name, shape in SHAPES.items()}
    masks = method.init(layers, rng)
    grads = {n: Layer(one.weight * masks[n], None if n == "head" else one.weight) for n, one in layers.items()}
    after = method.update(20, grads, masks, rng)
    assert torch.equal(after["head"], masks["head"])
    assert all(count(after[name]) > 2 * count(masks[name]) for name in ("first", "second"))
    with pytest.raises(ValueError, match="needs dense gradients"):
        method.update(20, layers, masks, rng)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 0.5}, r"peak=3.0 times the density 0.5 of sparsity=0.5 is more than all.*at most 2"),
        ({"peak": 0.5}, r"peak=0.5 must be a finite number of at least 1"),
        ({"cycles": 0}, r"cycles=0 must be a whole number of cycles"),
        ({"cycles": 1.5}, r"cycles=1.5 must be a whole number of cycles|number"),
        ({"wave": "square"}, r"square.*cosine.*triangular"),
        ({"end": 300}, r"end=300, total=200"),
    ],
)
def test_impossible_cycles_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Cyclic(**{"sparsity": 0.9, "end": 80, "total": 200, **settings})
