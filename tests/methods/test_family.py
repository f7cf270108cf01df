"""Methods that change the topology during training equal deliberately naive versions of them, ties included."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from granet import ACDC, DSR, MEST, SET, SNFS, DeepR, RigLITOP, Sparsifier
from granet.criterion import Layer, NonFiniteScores

SHAPES = {"first": (4, 3, 3), "narrow": (2, 5), "wide": (12, 9)}


def ranked(scores, among):
    """Flat positions among the candidates, the highest score first, the earlier of equals first."""
    return sorted((i for i in range(scores.size) if among.flat[i]), key=lambda i: (-scores.flat[i], i))


def keep(mask, scores, n):
    out = np.zeros(mask.size, bool)
    out[ranked(scores, mask)[:n]] = True
    return out.reshape(mask.shape)


def shared(total, weights, room):
    """One unit at a time to the layer furthest below its share of what the layers with room get."""
    full = {name for name in room if room[name] == 0}
    while True:
        rest = total - sum(room[name] for name in full)
        heavy = sum(weights[name] for name in room if name not in full)
        ideal = {n: room[n] if n in full else rest * (weights[n] / heavy if heavy else 0) for n in room}
        over = {n for n in room if n not in full and ideal[n] >= room[n]}
        if not over:
            break
        full |= over
    got = {name: min(room[name], math.floor(ideal[name] + 1e-9)) for name in room}
    while sum(got.values()) < total:
        got[max((n for n in room if got[n] < room[n]), key=lambda n: ideal[n] - got[n])] += 1
    return got


def total(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("step", [10, 60])
def test_snfs(case, step):
    weights, grads, masks, layers, given = case
    method = SNFS(sparsity=0.5, total=100, interval=10)
    p = 0.25 * (1 + math.cos(math.pi * step / 100))
    kept = {}
    for name, mask in masks.items():
        active = int(mask.sum())
        kept[name] = keep(mask, np.abs(weights[name]), active - min(int(p * active), active - 1))
    momentum = {name: float(np.abs(grads[name][mask]).astype(float).mean()) for name, mask in masks.items()}
    room = {name: int((~mask).sum()) for name, mask in kept.items()}
    grown = shared(total(masks) - total(kept), momentum, room)
    got = method.update(step, layers, given, torch.Generator())
    for name in SHAPES:
        want = kept[name].copy().reshape(-1)
        want[ranked(np.abs(grads[name]), ~kept[name])[: grown[name]]] = True
        assert got[name].numpy().tolist() == want.reshape(SHAPES[name]).tolist()
    assert total(got) == total(masks)


def test_snfs_without_any_momentum_and_with_one_that_overflowed(case):
    _, _, masks, layers, given = case
    method = SNFS(sparsity=0.5, total=100, interval=10)
    still = {name: Layer(layer.weight, torch.zeros_like(layer.weight)) for name, layer in layers.items()}
    assert total(method.update(10, still, given, torch.Generator())) == total(masks)
    layers["wide"].grad[masks["wide"]] = float("inf")
    with pytest.raises(NonFiniteScores, match="wide"):
        method.update(10, layers, given, torch.Generator())


def test_dsr(case):
    weights, _, masks, layers, given = case
    memory = {}
    method = DSR(sparsity=0.5, total=100, interval=10, threshold=0.4, drop_fraction=0.2, tolerance=0.1)
    h = 0.4
    for step in (10, 20, 30):
        before = {name: mask.numpy() for name, mask in given.items()}
        kept = {}
        for name, mask in before.items():
            small = int((mask & (np.abs(weights[name]) < h)).sum())
            active = int(mask.sum())
            kept[name] = keep(mask, np.abs(weights[name]), active - min(small, active - 1))
        k, active = total(before) - total(kept), total(before)
        h *= 2 if k < 0.9 * 0.2 * active else 0.5 if k > 1.1 * 0.2 * active else 1
        survivors = {name: float(mask.sum()) for name, mask in kept.items()}
        grown = shared(k, survivors, {name: int((~mask).sum()) for name, mask in kept.items()})
        given = method.update(step, layers, given, torch.Generator().manual_seed(step), memory)
        for name in SHAPES:
            assert (given[name].numpy() >= kept[name]).all()
            assert int(given[name].sum()) == survivors[name] + grown[name]
        assert float(memory["threshold"]) == h
    assert total(given) == total(masks)


@pytest.mark.parametrize(("step", "p"), [(10, 0.4), (50, 0.2)])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_mest(case, step, p, weight):
    weights, grads, masks, layers, given = case
    method = MEST(
        sparsity=0.5, halve=50, end=80, interval=10, drop_fraction=0.4, gradient_weight=weight, distribution="erk"
    )
    for name, mask in masks.items():  # whatever the gradient of inactive weights is, nobody looks at it
        layers[name].grad[torch.from_numpy(~mask)] = float("nan")
    got = method.update(step, layers, given, torch.Generator())
    for name, mask in masks.items():
        active = int(mask.sum())
        n = int(p * active)
        importance = np.abs(weights[name]) + np.float32(weight) * np.abs(np.where(mask, grads[name], 0))
        assert (got[name].numpy() >= keep(mask, importance, active - n)).all()
        assert int(got[name].sum()) == active


def test_mest_with_a_soft_bound_trains_more_and_ends_at_the_target(case):
    weights, grads, _, layers, _ = case
    method = MEST(sparsity=0.8, halve=50, end=75, interval=10, drop_fraction=0.5, gradient_weight=0.1, soft_bound=True)
    n = sum(math.prod(shape) for shape in SHAPES.values())
    masks = method.init(layers, torch.Generator().manual_seed(1))
    assert total(masks) == round(n * 0.3)
    for step, density in ((10, 0.3), (50, 0.25), (70, 0.25), (75, 0.2)):
        assert method.is_update(step)
        before = {name: mask.numpy() for name, mask in masks.items()}
        masks = method.update(step, layers, masks, torch.Generator().manual_seed(step))
        assert total(masks) == math.floor(n * density + 0.5)
        for name, count in method.final_counts(SHAPES).items():
            importance = np.abs(weights[name]) + np.float32(0.1) * np.abs(grads[name])
            assert (masks[name].numpy() >= keep(before[name], importance, count)).all()
    assert {name: int(mask.sum()) for name, mask in masks.items()} == method.final_counts(SHAPES)
    assert not any(method.is_update(step) for step in range(76, 200))


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_ac_dc(case, scope):
    weights, _, _, layers, given = case
    method = ACDC(sparsity=0.6, begin=10, interval=5, end=85, scope=scope)
    n = round(0.4 * sum(math.prod(shape) for shape in SHAPES.values()))
    got = method.update(10, layers, given, torch.Generator())
    assert total(got) == n
    if scope == "global":
        flat = np.concatenate([np.abs(weights[name]).reshape(-1) for name in SHAPES])
        want = keep(np.ones(flat.shape, bool), flat, n)
        chosen = np.concatenate([got[name].numpy().reshape(-1) for name in SHAPES])
        assert chosen.tolist() == want.tolist() or not all(
            part.any() for part in np.split(want, np.cumsum([math.prod(s) for s in SHAPES.values()])[:-1])
        )
    else:
        for name in SHAPES:
            every = np.ones(SHAPES[name], bool)
            assert got[name].numpy().tolist() == keep(every, np.abs(weights[name]), int(got[name].sum())).tolist()
    dense = method.update(15, layers, got, torch.Generator())
    assert all(mask.all() for mask in dense.values())


def test_ac_dc_has_the_phases_of_the_authors_imagenet_run():
    """Ten epochs dense, five and five in turn, dense from 75 to 85, sparse to the end; a step stands for an epoch."""
    method = ACDC(sparsity=0.9, begin=10, interval=5, end=85)
    changes = [step for step in range(1, 101) if method.is_update(step)]
    assert changes == [*range(10, 80, 5), 85]
    assert [method.sparsity_at(step) for step in (0, 9, 10, 14, 15, 70, 74, 75, 84, 85, 100)] == [
        *(0.0, 0.0, 0.9, 0.9, 0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9)
    ]
    with pytest.raises(ValueError, match="leave no room"):
        ACDC(sparsity=0.9, begin=10, interval=5, end=19)


def test_ac_dc_has_sparse_and_dense_phases_of_different_lengths():
    """The authors' lengths on CIFAR-100, 20 epochs sparse and 13 dense; a step stands for an epoch."""
    method = ACDC(sparsity=0.9, begin=10, interval=20, dense_interval=13, end=120)
    changes = [step for step in range(1, 201) if method.is_update(step)]
    assert changes == [10, 30, 43, 63, 76, 96, 120]
    assert [method.sparsity_at(step) for step in (9, 10, 29, 30, 42, 43, 96, 119, 120)] == [
        *(0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.0, 0.0, 0.9)
    ]
    alike = ACDC(sparsity=0.9, begin=10, interval=5, dense_interval=5, end=85)
    default = ACDC(sparsity=0.9, begin=10, interval=5, end=85)
    assert [alike.compressed(step) for step in range(100)] == [default.compressed(step) for step in range(100)]
    for wrong, message in ((-1, "dense_interval"), (71, "leave no room")):
        with pytest.raises(ValueError, match=message):
            ACDC(sparsity=0.9, begin=10, interval=5, dense_interval=wrong, end=85)


def test_deep_r_rewires_what_would_cross_zero(case):
    weights, _, masks, layers, given = case
    method = DeepR(sparsity=0.5, l1=0.8, temperature=0.0)
    rng, lr, memory = torch.Generator().manual_seed(0), dict.fromkeys(SHAPES, 0.5), {}
    born = {name: np.sign(w) for name, w in weights.items()}
    moved = method.drift(1, layers, given, rng, lr, memory)
    for name, mask in masks.items():
        w = weights[name] - np.float32(0.5 * 0.8) * born[name]
        w[w * born[name] < 0] = 0
        np.testing.assert_allclose((weights[name] + moved[name].numpy())[mask], w[mask], atol=1e-6)
    after = method.update(1, layers, given, rng, memory)
    for name, mask in masks.items():
        alive = mask & (np.abs(weights[name]) >= np.float32(0.4)) & (born[name] != 0)
        new = after[name].numpy()
        assert new.sum() == mask.sum() and (new >= alive).all()
        sign = memory[name].numpy()
        assert (sign[alive] == born[name][alive]).all()
        assert set(np.abs(sign[new]).tolist()) <= {1} and not sign[~new].any()


def test_deep_r_shakes_with_the_deviation_of_its_temperature_and_signs_are_fair():
    method = DeepR(sparsity=0.5, l1=0.0, temperature=0.02)
    layers, masks = {"w": Layer(torch.full((300, 300), 50.0))}, {"w": torch.ones(300, 300, dtype=torch.bool)}
    rng = torch.Generator().manual_seed(0)
    change = method.drift(1, layers, masks, rng, {"w": 0.25}, {})["w"]
    assert change.std().item() == pytest.approx(math.sqrt(2 * 0.25 * 0.02), rel=0.02)
    assert abs(change.mean().item()) < 0.002
    memory = {"w": torch.zeros(300, 300, dtype=torch.int8)}
    method.update(1, layers, masks, rng, memory)
    assert abs(memory["w"].float().mean().item()) < 0.02 and memory["w"].abs().all()


def test_deep_r_in_training_keeps_its_signs_and_starts_from_zero():
    torch.manual_seed(0)
    model = nn.Linear(40, 30, bias=False)
    sparsifier = Sparsifier(model, DeepR(sparsity=0.7, l1=0.02, temperature=1e-4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    rewired = 0
    for step in range(40):
        mask, weight = sparsifier.masks["weight"], model.weight.detach().clone()
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now, after = sparsifier.masks["weight"], model.weight.detach()
        assert now.sum() == 360 and not after[~now].any()
        assert not after[now & ~mask].any()
        if step:
            stayed = mask & now & (weight != 0) & (after != 0)
            assert (weight[stayed].sign() == after[stayed].sign()).all()
        rewired += int((now & ~mask).sum())
    assert rewired > 20


@pytest.mark.parametrize("step", [10, 60])
def test_rigl_itop(case, step):
    weights, grads, masks, layers, given = case
    method = RigLITOP(sparsity=0.5, total=100, interval=10)
    p = 0.005 + 0.5 * 0.495 * (1 + math.cos(math.pi * step / 100))
    got = method.update(step, layers, given, torch.Generator())
    for name, mask in masks.items():
        active = int(mask.sum())
        n = int(p * active)
        want = keep(mask, np.abs(weights[name]), active - n).reshape(-1)
        want[ranked(np.abs(grads[name]), ~want.reshape(mask.shape))[:n]] = True
        assert got[name].numpy().tolist() == want.reshape(mask.shape).tolist()
    assert method.is_update(90) and not method.is_update(100) and not method.replaces_step


def test_set_by_sign(case):
    weights, _, masks, layers, given = case
    method = SET(sparsity=0.5, total=100, interval=10, drop_fraction=0.4, by_sign=True)
    got = method.update(10, layers, given, torch.Generator().manual_seed(1))
    for name, mask in masks.items():
        active, w = int(mask.sum()), weights[name]
        n = int(0.4 * active)
        negative, positive = mask & (w < 0), mask & (w >= 0)
        fewer = n * int(negative.sum()) // active
        kept = keep(negative, w * -1, int(negative.sum()) - fewer)  # the largest negative ones, next to zero, go
        kept |= keep(positive, w, int(positive.sum()) - (n - fewer))  # and the smallest positive ones
        assert (got[name].numpy() >= kept).all() and int(got[name].sum()) == active


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MEST(sparsity=0.2, halve=5, end=9, drop_fraction=0.5, soft_bound=True), "more than all weights"),
        (lambda: MEST(sparsity=0.8, halve=10, end=9), "halve <= end"),
        (lambda: DeepR(sparsity=0.8, temperature=float("inf")), "temperature"),
        (lambda: DSR(sparsity=0.8, total=9, threshold=0), "threshold"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
