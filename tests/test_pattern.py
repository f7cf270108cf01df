"""Patterns: which masks are allowed, exact counts in each, and what the rest of granet makes of them."""

from fractions import Fraction
from math import floor, prod

import numpy as np
import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

import granet
from granet import Sparsifier, topology
from granet.criterion import Layer, NonFiniteScores, gradient, magnitude, own_values
from granet.distribution import Limited, capacity
from granet.pattern import NM, Block, Channel, Pattern, parse
from granet.topology import count, exchange, grow, grow_random, prune_to, random_masks, top
from pattern_checks import group_counts, is_legal, network


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (None, Pattern()),
        ("unstructured", Pattern()),
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("4x1", Block(4, 1)),
        ("16x16", Block(16, 16)),
        ("channel", Channel()),
    ],
)
def test_a_pattern_has_a_name(text, pattern):
    assert parse(text) == pattern
    assert str(pattern) == text or text is None
    assert parse(pattern) is pattern


@pytest.mark.parametrize(
    "text", ["3:2", "4:4", "0:4", "0x4", "4x0", "2;4", "2:4:8", "-1:4", "block", "chanel", "", "4"]
)
def test_what_is_no_pattern_is_refused_with_what_there_is(text):
    with pytest.raises(ValueError, match=r"no pattern .*'unstructured', 'N:M' with 0 < N < M .*'RxC'.*'channel'"):
        parse(text)


def test_the_nearest_pattern_is_named():
    with pytest.raises(ValueError, match="did you mean 'channel'"):
        parse("chanel")
    with pytest.raises(ValueError, match="did you mean '2:4'"):
        Sparsifier(network(), granet.Static(sparsity=0.5), pattern="2;4")


# N:M against a naive version


def naive_top(scores, n, among, m, limits):
    """By sorting: legal candidates first, then those within the second limit, then the rest; then score; then place.

    `limits` are, for each group, the numbers of candidates in each tier together.
    """
    rows, inputs, taps = scores.shape
    tier = {}
    for o, g, t in np.ndindex(rows, inputs // m, taps):
        members = [(o, g * m + k, t) for k in range(m) if among[o, g * m + k, t]]
        members.sort(key=lambda at: (-scores[at], at[1]))
        for rank, at in enumerate(members):
            tier[at] = sum(rank >= limit[o, g, t] for limit in limits)
    order = sorted(tier, key=lambda at: (tier[at], -scores[at], at))
    chosen = np.zeros(scores.shape, bool)
    for at in order[:n]:
        chosen[at] = True
    return chosen


@st.composite
def problems(draw):
    n, m = draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (2, 3), (3, 5)]))
    shape = draw(st.integers(1, 4)), m * draw(st.integers(1, 3)), draw(st.integers(1, 2))
    values = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    weight, grad = (
        np.array(draw(st.lists(values, min_size=prod(shape), max_size=prod(shape))), np.float32).reshape(shape)
        for _ in range(2)
    )
    mask = np.array(draw(st.lists(st.booleans(), min_size=prod(shape), max_size=prod(shape)))).reshape(shape)
    return n, m, weight, grad, mask


def in_groups(mask, m):
    return mask.reshape(mask.shape[0], -1, m, mask.shape[2]).sum(2)


@settings(deadline=None)
@cases(problems(), st.data())
def test_pruning_and_growth_equal_the_naive_version(problem, data):
    n, m, weight, grad, mask = problem
    active, held = int(mask.sum()), in_groups(mask, m)
    keep, more = data.draw(st.integers(0, active)), data.draw(st.integers(0, mask.size - active))
    legal = np.full_like(held, n)
    with topology.obeying(NM(n, m)):
        layer = Layer(torch.tensor(weight), torch.tensor(grad))
        kept = top([layer], magnitude, keep, [torch.tensor(mask)])[0]
        grown = grow(torch.tensor(mask), torch.tensor(grad), more)
    assert np.array_equal(kept.numpy(), naive_top(abs(weight), keep, mask, m, [legal]))
    room = [np.maximum(n - held, 0)]
    assert np.array_equal(grown.numpy(), mask | naive_top(grad, more, ~mask, m, room))


@settings(deadline=None)
@cases(problems(), st.floats(0, 1))
def test_exchange_equals_the_naive_version_and_overfills_no_group(problem, ratio):
    n, m, weight, grad, mask = problem
    with topology.obeying(NM(n, m)):
        layer = Layer(torch.tensor(weight), torch.tensor(grad))
        after = exchange(torch.tensor(mask), layer, ratio, lose=magnitude, gain=gradient).numpy()
    active, had = int(mask.sum()), in_groups(mask, m)
    moved = floor(Fraction(str(round(ratio, 12))) * active) if active < mask.size else 0
    kept = naive_top(abs(weight), active - moved, mask, m, [np.full_like(had, n)]) if moved else mask
    held = in_groups(kept, m)
    room = [np.maximum(n - held, 0), np.maximum(n, had) - held]
    assert np.array_equal(after, kept | naive_top(abs(grad), moved, ~kept, m, room))
    assert after.sum() == active
    assert (in_groups(after, m) <= np.maximum(n, had)).all()


@settings(deadline=None)
@cases(problems(), st.data())
def test_random_masks_fill_groups_to_the_limit_before_any_goes_above(problem, data):
    n, m, weight, _, mask = problem
    total = data.draw(st.integers(0, weight.size))
    with topology.obeying(NM(n, m)):
        rng = torch.Generator().manual_seed(1)
        drawn = random_masks({"a": total}, {"a": weight.shape}, rng)["a"].numpy()
        more = data.draw(st.integers(0, int((~mask).sum())))
        grown = grow_random(torch.tensor(mask), more, rng).numpy()
    assert drawn.sum() == total and grown.sum() == mask.sum() + more
    groups = in_groups(drawn, m)
    assert (groups <= n).all() if total <= groups.size * n else (groups >= n).all()
    # growth goes above the limit only where no group has room below it
    held, now = in_groups(mask, m), in_groups(grown, m)
    assert (now <= np.maximum(held, n)).all() or (now >= n).all()


def test_pruning_takes_what_is_beyond_the_limit_first_in_the_whole_network():
    torch.manual_seed(0)
    layers = {"a": Layer(torch.randn(6, 8)), "b": Layer(100 * torch.randn(4, 12, 3))}
    masks = {name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in layers.items()}
    with topology.obeying(NM(1, 4)):
        some = prune_to(masks, 100, layers, magnitude)
        exact = prune_to(some, 48, layers, magnitude)
        fewer = prune_to(exact, 20, layers, magnitude)
    assert sum(map(count, some.values())) == 100
    assert all(min(group_counts(mask, 4)) >= 1 for mask in some.values())  # no legal entry has gone yet
    assert all(set(group_counts(mask, 4)) == {1} for mask in exact.values())
    for name, layer in layers.items():  # each group keeps its largest
        kept = (layer.weight * exact[name]).unflatten(1, (-1, 4)).abs().sum(2)
        assert torch.equal(kept, layer.weight.unflatten(1, (-1, 4)).abs().amax(2))
    assert sum(map(count, fewer.values())) == 20
    assert all(max(group_counts(mask, 4)) == 1 for mask in fewer.values())


def test_scores_that_are_not_finite_are_refused_under_a_pattern():
    scores = torch.rand(4, 8)
    scores[1, 3] = float("nan")
    with topology.obeying(NM(2, 4)), pytest.raises(NonFiniteScores):
        topology.drop(torch.ones(4, 8, dtype=torch.bool), scores, 16)  # exactly 2:4: nothing else would look at them


def test_the_pattern_ends_with_the_block_it_is_set_for():
    scores, mask = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="stop"), topology.obeying(NM(1, 2)):
        assert topology.drop(mask, scores, 2).tolist() == [[True, False, True, False]]
        raise RuntimeError("stop")
    assert topology.drop(mask, scores, 2).tolist() == [[True, True, False, False]]


# budgets


@pytest.mark.parametrize("name", ["uniform", "er", "erk"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.7, 1.0])
def test_no_layer_gets_more_than_the_pattern_lets_it_have_unless_all_do(name, density):
    pattern = NM(2, 4)
    shapes = {k: pattern.shape(s) for k, s in {"a": (8, 4, 3, 3), "b": (300, 64), "c": (10, 300)}.items()}
    counts = granet.distribution.named(name)(shapes, density)
    total = sum(map(prod, shapes.values()))
    assert sum(counts.values()) == granet.distribution.budget(total, density)
    if density <= 0.5:
        assert all(counts[k] <= capacity(shape) == prod(shape) // 2 for k, shape in shapes.items())
    else:
        assert all(counts[k] == pytest.approx(density * prod(shape), abs=1) for k, shape in shapes.items())


def test_a_limited_shape_is_a_shape():
    shape = NM(1, 4).shape((8, 16))
    assert shape == (8, 16) and isinstance(shape, Limited) and capacity(shape) == 32
    assert capacity((8, 16)) == 128


# blocks and channels


@pytest.mark.parametrize(
    ("pattern", "shape", "units"),
    [
        ("4x1", (8, 6), (2, 6)),
        ("2x3", (4, 6, 2, 2), (2, 2, 2, 2)),
        ("16x16", (32, 16, 3), (2, 1, 3)),
        ("channel", (5, 3, 2), (5,)),
        ("channel", (5, 3), (5,)),
    ],
)
def test_units_are_means_and_masks_spread_over_them(pattern, shape, units):
    rng = np.random.default_rng(0)
    weight, grad = rng.standard_normal((2, *shape)).astype(np.float32)
    one = parse(pattern)
    r, c = (one.rows, one.columns) if pattern != "channel" else (1, prod(shape[1:]))
    assert one.shape(shape) == units
    pooled = one.pooled(Layer(torch.tensor(weight), torch.tensor(grad)))
    mask = torch.tensor(rng.random(units) < 0.5)
    spread = one.expanded(mask, shape)
    assert spread.shape == shape and spread.dtype == torch.bool
    if pattern == "channel":
        weight, grad, flat = (np.reshape(x, (shape[0], -1)) for x in (weight, grad, spread.numpy()))
        units = (*units, 1)
    else:
        flat = spread.numpy()
    for at in np.ndindex(units):
        where = (slice(at[0] * r, at[0] * r + r), slice(at[1] * c, at[1] * c + c), *at[2:])
        unit = at if pattern != "channel" else at[:1]
        for mine, values in ((pooled.weight, weight[where]), (pooled.grad, grad[where])):
            assert mine[unit].item() == pytest.approx(abs(values).mean() * np.sign(values.sum()), rel=1e-5)
        assert (flat[where] == mask[unit].item()).all()
    assert torch.equal(one.pooled_mask(spread), mask)
    assert one.obeyed(spread) and is_legal(spread, pattern)
    spoilt = spread.clone()
    spoilt.view(-1)[0] ^= True
    assert not one.obeyed(spoilt) and not is_legal(spoilt, pattern)


def test_half_precision_is_averaged_in_single():
    layer = Layer(torch.full((2048, 16), 1.001).bfloat16(), torch.full((2048, 16), 3e38).bfloat16())
    pooled = Block(2048, 16).pooled(layer)
    assert pooled.weight.dtype == torch.float32 and pooled.weight.item() == pytest.approx(1.0)
    assert Channel().pooled(Layer(torch.ones(2, 3).double())).weight.dtype == torch.float64


# in training


def test_given_scores_are_ranked_as_they_are():
    with topology.obeying(NM(1, 2)):
        kept = top(
            [Layer(torch.tensor([[-3.0, -1.0, 2.0, 5.0]]))], own_values, 2, [torch.ones(1, 4, dtype=torch.bool)]
        )[0]
    assert kept.tolist() == [[False, True, False, True]]
