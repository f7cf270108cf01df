"""Each method's update equals a deliberately naive version of it, in NumPy, from the papers; ties included."""

import math
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch

from granet import GMP, SET, GraNet, RigL
from granet.criterion import Layer
from granet.topology import count


def best(scores, n, among):
    """Positions of the `n` highest scores among the candidates; the earlier of equals first."""
    order = sorted((i for i in range(scores.size) if among.flat[i]), key=lambda i: (-scores.flat[i], i))
    return order[:n]


def keep(mask, scores, n):
    out = np.zeros(mask.size, bool)
    out[best(scores, n, mask)] = True
    return out.reshape(mask.shape)


def naive_exchange(mask, weight, grad, ratio):
    active = int(mask.sum())
    n = floor(Fraction(str(round(ratio, 12))) * active)
    kept = keep(mask, np.abs(weight), active - n)
    out = kept.copy().reshape(-1)
    out[best(np.abs(grad), n, ~kept)] = True
    return out.reshape(mask.shape)


def prune_global(masks, weights, n):
    """The `n` largest active weights of the whole network; every layer keeps its largest one."""
    if n >= sum(int(m.sum()) for m in masks.values()):
        return masks
    entries = []
    for rank, name in enumerate(masks):
        largest = best(np.abs(weights[name]), 1, masks[name])[0]
        for i in range(masks[name].size):
            if masks[name].flat[i]:
                entries.append((i != largest, -abs(weights[name].flat[i]), rank, i, name, i == largest))
    # the order in which places are given: first come the weights that would be kept anyway
    plain = sorted(entries, key=lambda e: (e[1], e[2], e[3]))
    chosen = plain[:n]
    empty = [name for name in masks if not any(e[4] == name for e in chosen)]
    while empty:
        saved = [e for e in entries if e[4] in empty and e[5]]
        rest = [e for e in plain if e[4] not in empty]
        chosen = saved + rest[: n - len(saved)]
        missing = [name for name in masks if not any(e[4] == name for e in chosen)]
        if not missing:
            break
        empty += missing
    out = {name: np.zeros(mask.size, bool) for name, mask in masks.items()}
    for entry in chosen:
        out[entry[4]][entry[3]] = True
    return {name: out[name].reshape(masks[name].shape) for name in masks}


def cubic(initial, final, begin, end, t):
    if t >= end:
        return final
    return final + (initial - final) * (1 - max(0, t - begin) / (end - begin)) ** 3


def active_at(total, sparsity):
    return math.floor(total * (1 - sparsity) + 0.5)


def naive_gmp(method, step, weights, grads, masks):
    n = active_at(sum(m.size for m in masks.values()), cubic(0.0, method.sparsity, method.begin, method.end, step))
    return prune_global(masks, weights, n)


def naive_granet(method, step, weights, grads, masks):
    s = cubic(method.initial_sparsity, method.sparsity, method.begin, method.end, step)
    masks = prune_global(masks, weights, active_at(sum(m.size for m in masks.values()), s))
    r = 0.005 + 0.5 * (method.regeneration - 0.005) * (1 + math.cos(math.pi * step / method.total))
    return {name: naive_exchange(mask, weights[name], grads[name], r) for name, mask in masks.items()}


def naive_rigl(method, step, weights, grads, masks):
    alpha = method.drop_fraction / 2 * (1 + math.cos(step * math.pi / method.end))
    return {name: naive_exchange(mask, weights[name], grads[name], alpha) for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("naive", "method", "step"),
    [
        (naive_gmp, GMP(sparsity=0.8, begin=10, end=50, interval=10), 30),
        (naive_gmp, GMP(sparsity=0.97, end=50, interval=10), 50),
        (naive_granet, GraNet(sparsity=0.9, initial_sparsity=0.5, end=50, total=100, interval=10), 20),
        (naive_granet, GraNet(sparsity=0.95, initial_sparsity=0.0, end=50, total=100, interval=10), 60),
        (naive_rigl, RigL(sparsity=0.8, end=75, interval=10), 10),
        (naive_rigl, RigL(sparsity=0.8, end=75, interval=10, drop_fraction=1.0), 30),
    ],
)
def test_update_equals_the_naive_version(naive, method, step, case):
    weights, grads, masks, layers, given = case
    expected = naive(method, step, weights, grads, masks)
    got = method.update(step, layers, given, torch.Generator())
    for name in masks:
        assert got[name].numpy().tolist() == expected[name].tolist()


def test_set_drops_the_smallest_and_grows_anything_but_active_ones(case):
    weights, _, _, layers, masks = case
    method = SET(sparsity=0.5, total=100, interval=10, drop_fraction=0.4)
    got = method.update(10, layers, masks, torch.Generator())
    for name, mask in masks.items():
        n = int(0.4 * count(mask))
        kept = torch.from_numpy(keep(mask.numpy(), np.abs(weights[name]), count(mask) - n))
        assert not (kept & ~got[name]).any()
        assert count(got[name]) == count(mask)


def test_granet_on_a_table_a_reader_can_follow():
    """Ten weights, half of them active, at the step where pruning ends at 60 % sparsity and r is 0.55."""
    weight = torch.tensor([0.9, 0.0, -0.8, 0.0, 0.1, 0.7, 0.0, -0.6, 0.0, 0.0])
    grad = torch.tensor([0.0, 0.1, 0.0, 0.9, 0.2, 0.0, 0.3, 0.0, -0.8, 0.4])
    mask = weight != 0
    method = GraNet(sparsity=0.6, initial_sparsity=0.5, end=1, total=1000, interval=1, regeneration=0.55)
    # pruning leaves four of five: 0.1 goes. Regeneration trades two of the four: 0.7, -0.6 for gradients 0.9, -0.8
    after = method.update(1, {"w": Layer(weight, grad)}, {"w": mask}, torch.Generator())["w"]
    assert after.int().tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 1, 0]


def test_granet_uniform_prunes_every_layer_by_the_same_share():
    shapes = {"a": (30, 30), "b": (10, 20)}
    layers = {n: Layer(torch.randn(s) * (100 if n == "a" else 1), torch.randn(s)) for n, s in shapes.items()}
    method = GraNet(sparsity=0.9, initial_sparsity=0.5, end=100, total=200, interval=10, scope="layerwise")
    masks = method.init(layers, torch.Generator())
    initial = {name: count(mask) for name, mask in masks.items()}
    for step in range(10, 101, 10):
        masks = method.update(step, layers, masks, torch.Generator())
    for name, mask in masks.items():
        assert count(mask) == pytest.approx(initial[name] / 5, abs=1)
