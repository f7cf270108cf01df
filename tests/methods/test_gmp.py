"""Gale et al.'s choices for the first and the last layer, and the schedules."""

import pytest
import torch

from granet import GMP, GraNet
from granet.criterion import Layer
from granet.distribution import budget
from granet.topology import count

SHAPES = {"conv": (8, 3, 3, 3), "wide": (60, 40), "middle": (40, 40), "head": (10, 60)}


def pruned(method, step):
    rng = torch.Generator().manual_seed(0)
    layers = {name: Layer(torch.randn(shape, generator=rng)) for name, shape in SHAPES.items()}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    masks = method.update(step, layers, masks, rng)
    return {name: count(mask) for name, mask in masks.items()}


def test_first_layer_dense_last_layer_at_most_80_percent_and_the_budget_exact():
    method = GMP(sparsity=0.9, end=100, scope="layerwise", dense_first=True, last_sparsity=0.8)
    total = 216 + 2400 + 1600 + 600
    counts = pruned(method, 100)
    assert sum(counts.values()) == round(total * 0.1)
    assert counts == method.final_counts(SHAPES)
    assert counts["conv"] == 216 and counts["head"] == 120
    # what is left is shared alike
    assert counts["wide"] / 2400 == pytest.approx(counts["middle"] / 1600, abs=2e-3)
    assert counts["wide"] / 2400 < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_layerwise_pruning_meets_every_budget_though_rounded_parts_may_grow(seed):
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 60, (7,), generator=rng).tolist()
    layers = {str(i): Layer(torch.randn(n, 7, generator=rng)) for i, n in enumerate(sizes)}
    masks = {name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in layers.items()}
    total = sum(mask.numel() for mask in masks.values())
    method = GMP(sparsity=0.95, end=100, interval=1, scope="layerwise", schedule="linear")
    for step in range(1, 101):
        masks = method.update(step, layers, masks, rng)
        assert sum(map(count, masks.values())) == budget(total, 1 - method.sparsity_at(step))


def test_the_last_layer_is_pruned_like_the_others_until_its_cap():
    method = GMP(sparsity=0.9, end=100, scope="layerwise", schedule="linear", last_sparsity=0.8)
    half = pruned(method, 50)  # 45 % sparse: the cap is far
    assert half["head"] / 600 == pytest.approx(0.55, abs=2e-3)
    assert pruned(method, 100)["head"] == 120


def test_a_budget_that_the_kept_layers_use_up_is_refused():
    with pytest.raises(ValueError, match="lower the sparsity"):
        GMP(sparsity=0.97, end=100, scope="layerwise", dense_first=True).final_counts(SHAPES)


@pytest.mark.parametrize("more", [{"dense_first": True}, {"last_sparsity": 0.8}])
def test_global_pruning_refuses_them(more):
    with pytest.raises(ValueError, match="layerwise"):
        GMP(sparsity=0.9, end=100, **more)


def test_the_cap_is_a_sparsity():
    with pytest.raises(ValueError, match="last_sparsity"):
        GMP(sparsity=0.9, end=100, scope="layerwise", last_sparsity=1.5)


@pytest.mark.parametrize("name", ["cubic", "linear", "cosine", "sigmoid"])
def test_the_schedule_is_the_named_one(name):
    gmp = GMP(sparsity=0.8, begin=20, end=100, schedule=name)
    granet = GraNet(sparsity=0.8, initial_sparsity=0.4, begin=20, end=100, total=200, schedule=name)
    at = {"cubic": 1 - 0.75**3, "linear": 0.25, "cosine": (1 - 0.5**0.5) / 2, "sigmoid": 0.0451767}[name]
    assert gmp.sparsity_at(40) == pytest.approx(0.8 * at)
    assert granet.sparsity_at(40) == pytest.approx(0.4 + 0.4 * at)
    assert gmp.sparsity_at(100) == granet.sparsity_at(100) == 0.8
    for method in (GMP(sparsity=0.8, end=100, schedule=name), granet):
        assert method.is_update(100)


@pytest.mark.parametrize(
    "make", [lambda s: GMP(sparsity=0.8, end=9, schedule=s), lambda s: GraNet(sparsity=0.8, end=9, total=9, schedule=s)]
)
def test_an_unknown_schedule_is_refused(make):
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        make("sigmod")
