"""Each method's update equals a deliberately naive version of it, in NumPy, from the papers; ties included."""

import math
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch

from granet import GMP, METHODS, SET, GraNet, RigL, SRigL
from granet.criterion import Layer
from granet.distribution import budget, erk
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


def naive_srigl(method, step, weights, grads, masks):
    alpha = method.drop_fraction / 2 * (1 + math.cos(step * math.pi / method.end))
    budgets = erk({name: mask.shape for name, mask in masks.items()}, 1 - method.sparsity)
    found = {}
    for name, mask in masks.items():
        size, steep, neurons = np.abs(weights[name]), np.abs(grads[name]), range(len(mask))
        salient = [int(n.sum()) for n in naive_exchange(mask, weights[name], grads[name], alpha)]
        most = mask[0].size
        needed = max(1, math.floor(Fraction(str(method.min_salient)) * (budgets[name] // len(mask))))
        alive = [i for i in neurons if salient[i] >= needed]
        if name == list(masks)[-1] or not method.min_salient:
            alive = list(neurons)
        elif len(alive) * most < budgets[name]:
            alive = sorted(neurons, key=lambda i: (-salient[i], i))[: math.ceil(budgets[name] / most)]
        k = min(budgets[name] // len(alive), most)
        living = np.array([m if i in alive else np.zeros_like(m) for i, m in enumerate(mask)])
        active = int(mask.sum())
        n = active - floor(Fraction(str(round(alpha, 12))) * active)
        kept = keep(living, size, n)
        out = np.zeros(mask.shape, bool)
        for i in alive:
            row = keep(kept[i], size[i], k)
            grown = best(steep[i], k - int(row.sum()), ~row)
            out[i] = row
            out[i].flat[grown] = True
        found[name] = out
    return found


@pytest.mark.parametrize(
    ("method", "step"),
    [
        (GMP(sparsity=0.8, begin=10, end=50, interval=10), 30),
        (GMP(sparsity=0.97, end=50, interval=10), 50),
        (GraNet(sparsity=0.9, initial_sparsity=0.5, end=50, total=100, interval=10), 20),
        (GraNet(sparsity=0.95, initial_sparsity=0.0, end=50, total=100, interval=10), 60),
        (RigL(sparsity=0.8, end=75, interval=10), 10),
        (RigL(sparsity=0.8, end=75, interval=10, drop_fraction=1.0), 30),
        (SRigL(sparsity=0.7, end=75, interval=10, min_salient=0.8), 10),
        (SRigL(sparsity=0.5, end=75, interval=10, min_salient=1.0, drop_fraction=0.9), 30),
        (SRigL(sparsity=0.8, end=75, interval=10, min_salient=0.0), 10),
    ],
)
def test_update_equals_the_naive_version(method, step, case):
    """The naive version of a method is the function above that bears its name."""
    naive = globals()["naive_" + next(name for name, kind in METHODS.items() if kind is type(method)).replace("-", "_")]
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


UNIFORM = {"first": (40, 30), "second": (30, 40), "head": (10, 30)}  # ERK at 50 %: 0.438, 0.438, 1


def granet_uniform(sparsity, shapes=UNIFORM, **more):
    """The masks of GraNet-uniform at first, and after each of ten updates up to the end of gradual pruning."""
    rng = torch.Generator().manual_seed(3)
    method = GraNet(sparsity=sparsity, end=100, total=200, interval=10, scope="layerwise", **more)
    layers = {name: Layer(torch.randn(s, generator=rng), torch.randn(s, generator=rng)) for name, s in shapes.items()}
    masks = [method.init(layers, rng)]
    for step in range(10, 101, 10):
        masks.append(method.update(step, layers, masks[-1], rng))
        total = sum(mask.numel() for mask in masks[-1].values())
        assert sum(map(count, masks[-1].values())) == budget(total, 1 - method.sparsity_at(step))
    assert {name: count(mask) for name, mask in masks[-1].items()} == method.final_counts(shapes)
    return masks


def densities(masks):
    return [round(count(mask) / mask.numel(), 3) for mask in masks.values()]


def test_granet_uniform_ends_with_the_same_density_in_every_layer():
    masks = granet_uniform(0.7)
    assert densities(masks[0]) == [0.438, 0.438, 1.0]
    assert densities(masks[-1]) == [0.3, 0.3, 0.3]


def test_granet_uniform_can_hold_the_last_layer_at_a_fifth():
    assert densities(granet_uniform(0.7, last_sparsity=0.8)[-1]) == [0.3, 0.3, 0.3]  # the cap is not reached
    masks = granet_uniform(0.9, last_sparsity=0.8)[-1]
    assert count(masks["head"]) == 60
    assert count(masks["first"]) == count(masks["second"]) == (270 - 60) // 2


def test_granet_uniform_leaves_a_layer_that_starts_sparser_than_the_end():
    """Of 11,000 weights 5,280 stay: the wide layer has 4,500 from the start, so the head keeps the other 780."""
    first, *_, last = granet_uniform(0.52, {"wide": (100, 100), "head": (10, 100)}, initial_sparsity=0.5)
    assert [count(mask) for mask in first.values()] == [4500, 1000]
    assert [count(mask) for mask in last.values()] == [4500, 780]


@pytest.mark.parametrize("more", [{"scope": "global", "last_sparsity": 0.8}, {"last_sparsity": 1.5}])
def test_granet_refuses_a_cap_without_a_meaning(more):
    with pytest.raises(ValueError, match="last_sparsity"):
        GraNet(**{"sparsity": 0.9, "end": 10, "total": 20, "scope": "layerwise", **more})
