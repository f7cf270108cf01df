"""STR's weights and Top-KAST's sets and penalty equal deliberately naive versions of them, in NumPy; ties included."""

import math

import numpy as np
import pytest
import torch

from granet import STR, Fixed, TopKAST
from granet.criterion import Layer

SHAPES = {"first": (4, 3, 3), "narrow": (2, 5), "wide": (12, 9)}
seeds = pytest.mark.parametrize("seed", range(10))


def draw(seed, ties):
    rng = np.random.default_rng(seed)
    values = {n: rng.integers(-3, 4, s) if ties else rng.normal(size=s) for n, s in SHAPES.items()}
    return {name: value.astype(np.float32) for name, value in values.items()}


def as_layers(weights):
    return {name: Layer(torch.from_numpy(w)) for name, w in weights.items()}


def largest(entries, n):
    """The first `n` of (magnitude, position) in order of magnitude, the earlier position first."""
    return sorted(entries, key=lambda e: (-e[0], e[1]))[:n]


def rounded(x):
    return math.floor(x + 0.5)


@seeds
@pytest.mark.parametrize("s", [-4.0, -1.0, 0.0, 2.0])
def test_str_shrinks_every_weight_by_the_threshold(seed, s):
    method = STR(s_init=s)
    weights = draw(seed, ties=False)
    threshold = 1 / (1 + math.exp(-s))
    masks = method.init(as_layers(weights), torch.Generator())
    for name, w in weights.items():
        naive = np.zeros_like(w)
        for i in np.ndindex(w.shape):
            if w[i] > threshold:
                naive[i] = w[i] - threshold
            elif w[i] < -threshold:
                naive[i] = w[i] + threshold
        got = method.effective(torch.from_numpy(w), torch.full((1, 1), s))
        assert np.allclose(got.numpy(), naive, atol=1e-6)
        assert masks[name].tolist() == (naive != 0).tolist()
        layer = {name: Layer(torch.from_numpy(w), effective=got)}
        assert method.update(100, layer, {}, torch.Generator())[name].tolist() == (naive != 0).tolist()


@seeds
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("forward", "backward"), [(0.8, None), (0.5, 0.2), (0.9, 0.9), (0.3, None)])
def test_top_kast_layer_by_layer(seed, ties, forward, backward):
    method = TopKAST(sparsity=forward, backward_sparsity=backward, decay=0.1)
    weights = draw(seed, ties)
    layers = as_layers(weights)
    a = method.init(layers, torch.Generator())
    again = method.update(10, layers, {n: ~m for n, m in a.items()}, torch.Generator())
    sets = method.companions(layers, a)
    more = max(0.0, 1 - 2 * (1 - forward)) if backward is None else backward
    total = dict.fromkeys("ab", 0)
    for name, w in weights.items():
        entries = [(abs(w.flat[i]), i) for i in range(w.size)]
        naive = {}
        for key, mask, sparsity in (("a", a[name], forward), ("b", sets[name]["trained"], more)):
            n = int(mask.sum())  # the shares are rounded together; each is within one of its own
            assert abs(n - w.size * (1 - sparsity)) <= 1
            total[key] += n
            naive[key] = {i for _, i in largest(entries, n)}
            assert set(mask.flatten().nonzero().flatten().tolist()) == naive[key]
        assert torch.equal(again[name], a[name]) and torch.equal(sets[name]["active"], a[name])
        penalty = method.penalty(torch.from_numpy(w), **sets[name]).flatten()
        for i in range(w.size):
            rate = 0.1 if i in naive["a"] else 0.1 / (1 - forward) if i in naive["b"] else 0.0
            assert penalty[i].item() == pytest.approx(rate * w.flat[i], rel=1e-5)
    size = sum(math.prod(s) for s in SHAPES.values())
    assert total == {"a": rounded(round(size * (1 - forward), 6)), "b": rounded(round(size * (1 - more), 6))}


@seeds
@pytest.mark.parametrize("ties", [False, True])
def test_top_kast_over_all_layers(seed, ties):
    method = TopKAST(sparsity=0.7, backward_sparsity=0.4, scope="global")
    weights = draw(seed, ties)
    a = method.init(as_layers(weights), torch.Generator())
    sets = method.companions(as_layers(weights), a)
    entries = [(abs(w.flat[i]), (rank, i)) for rank, w in enumerate(weights.values()) for i in range(w.size)]
    for masks, n in ((a, rounded(154 * 0.3)), ({x: sets[x]["trained"] for x in sets}, rounded(154 * 0.6))):
        naive = {place for _, place in largest(entries, n)}
        empty = {0, 1, 2} - {rank for rank, _ in naive}  # each keeps its largest, the others share what is left
        saved = [largest([e for e in entries if e[1][0] == rank], 1)[0] for rank in empty]
        others = [e for e in entries if e[1][0] not in empty]
        naive = {place for _, place in saved + largest(others, n - len(saved))}
        got = {(r, i) for r, m in enumerate(masks.values()) for i in m.flatten().nonzero().flatten().tolist()}
        assert got == naive


def test_top_kast_keeps_a_weight_of_every_layer():
    layers = {"big": Layer(torch.full((10, 10), 5.0)), "small": Layer(torch.tensor([[0.1, -0.3, 0.2]]))}
    masks = TopKAST(sparsity=0.9, scope="global").init(layers, torch.Generator())
    assert masks["small"].tolist() == [[False, True, False]] and masks["big"].sum() == 9


def test_fixed_keeps_what_is_not_zero_and_names_an_empty_layer():
    layers = {"a": Layer(torch.tensor([0.0, -0.0, 1e-30, -2.0])), "b": Layer(torch.ones(2))}
    masks = Fixed().init(layers, torch.Generator())
    assert masks["a"].tolist() == [False, False, True, True]
    assert Fixed().update(5, layers, masks, torch.Generator()) == masks
    with pytest.raises(ValueError, match=r"'b' has none: load the pruned weights before .* skip='b'"):
        Fixed().init(layers | {"b": Layer(torch.zeros(2))}, torch.Generator())
