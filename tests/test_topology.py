"""Topology operations give back exactly as many entries as asked, the right ones, ties by position."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from granet.criterion import Layer, gradient, magnitude
from granet.pattern import NM, Block, parse
from granet.topology import (
    NonFiniteScores,
    count,
    draw,
    drop,
    exchange,
    grow,
    grow_random,
    in_rows,
    obeying,
    prune_to,
    random_masks,
    random_rows,
    rewire,
    row_counts,
    some,
    top,
    top_of_rows,
)

SCORES = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 1.0, 3.5, 7.25]), min_size=1, max_size=40)


def test_counts_that_cannot_be_are_refused():
    mask = torch.tensor([True, False, True])
    for operation, n in [(drop, 3), (grow, 2), (drop, -1), (grow, -1)]:
        with pytest.raises(ValueError, match="cannot select"):
            operation(mask, torch.ones(3), n)


def test_growth_never_selects_active_entries_even_when_all_gradients_are_zero():
    mask = torch.rand(30, 30) < 0.4
    grown = grow(mask, torch.zeros(30, 30), 100)
    assert count(grown) == count(mask) + 100
    assert torch.equal(grown & mask, mask)


def naive_top(scores, n, among):
    """The `n` best by sorting everything: highest score first, then first position."""
    order = sorted((-s, i) for i, (s, c) in enumerate(zip(scores, among, strict=True)) if c)
    chosen = {i for _, i in order[:n]}
    return [i in chosen for i in range(len(scores))]


@cases(SCORES, st.floats(0, 1), st.data())
def test_exchange_keeps_the_count(scores, ratio, data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    weight, grad = torch.tensor(scores), torch.tensor(scores).flip(0)
    before = mask.clone()
    after = exchange(mask, Layer(weight, grad), ratio, lose=magnitude, gain=gradient)
    assert count(after) == count(before)
    assert torch.equal(mask, before)
    n = floor(Fraction(str(round(ratio, 12))) * count(before))  # however few entries are inactive
    kept = naive_top(weight.abs().tolist(), count(before) - n, before.tolist())
    inactive = [not k for k in kept]
    grown = naive_top(grad.abs().tolist(), n, inactive)
    assert after.tolist() == [k or g for k, g in zip(kept, grown, strict=True)]


@settings(deadline=None)
@cases(
    st.integers(1, 60), st.floats(0.5, 1), st.floats(0, 1), st.sampled_from([None, NM(2, 4), Block(2, 2)]), st.data()
)
def test_dense_layers_exchange_as_large_a_share_as_sparse_ones(groups, density, ratio, pattern, data):
    """What was dropped may come back, so the number of weights inactive before is no limit (RigL, Algorithm 1)."""
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    layer = Layer(torch.randn(4, 4 * groups, generator=rng), torch.randn(4, 4 * groups, generator=rng))
    if pattern is not None:
        layer = pattern.pooled(layer)
    mask = random_masks({"a": round(density * layer.weight.numel())}, {"a": layer.shape}, rng)["a"]
    active = count(mask)
    n = floor(Fraction(str(round(ratio, 12))) * active)
    with obeying(None if pattern is None else pattern.order):
        kept = top([layer], magnitude, active - n, [mask])[0]
        grown = top([layer], gradient, n, [~kept], beside=[(kept, mask)])[0]
        after = exchange(mask, layer, ratio, lose=magnitude, gain=gradient)
        anywhere = rewire(mask, layer, ratio, rng, lose=magnitude)
    assert torch.equal(after, kept | grown)
    assert count(after) == count(anywhere) == active
    assert not (kept & ~anywhere).any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x2", "channel"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_a_layer_that_is_active_everywhere_stays_as_it_is(pattern, ratio):
    pattern = parse(pattern)
    layer = pattern.pooled(Layer(torch.randn(8, 8), torch.randn(8, 8)))
    mask = torch.ones(layer.shape, dtype=torch.bool)
    with obeying(pattern.order):
        assert exchange(mask, layer, ratio, lose=magnitude, gain=gradient).all()
        assert rewire(mask, layer, ratio, torch.Generator(), lose=magnitude).all()


def test_half_of_a_dense_layer_is_exchanged_though_a_tenth_is_inactive():
    """Nine of ten are active and half of them go, four: three of those four come back with the one inactive entry."""
    weight = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    grad = torch.tensor([0.0, 0, 0, 0, 0, 0.1, 0.4, 0.3, 0.2, 0.9])
    after = exchange(weight != 0, Layer(weight, grad), 0.5, lose=magnitude, gain=gradient)
    assert after.int().tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1]


def test_an_exchange_a_reader_can_follow():
    weight = torch.tensor([0.9, -0.1, 0.5, 0.0, 0.0, -0.7, 0.2, 0.0])
    grad = torch.tensor([0.1, 0.3, 0.1, 0.8, 0.2, 0.1, 0.1, -0.9])
    mask = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0]).bool()
    # 40 % of 5 active weights: -0.1 and 0.2 go, the steepest inactive gradients, 0.8 and -0.9, come
    after = exchange(mask, Layer(weight, grad), 0.4, lose=magnitude, gain=gradient)
    assert after.int().tolist() == [1, 0, 1, 1, 0, 1, 0, 1]


def test_prune_to_ranks_all_layers_together_and_empties_none():
    layers = {"big": Layer(torch.arange(1.0, 101.0)), "small": Layer(torch.full((5,), 0.01))}
    masks = {name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in layers.items()}
    pruned = prune_to(masks, 10, layers, magnitude)
    assert {name: count(mask) for name, mask in pruned.items()} == {"big": 9, "small": 1}
    assert pruned["big"].nonzero().squeeze(1).tolist() == list(range(91, 100))
    assert pruned["small"].tolist() == [True, False, False, False, False]


@settings(deadline=None)
@cases(st.integers(1, 5), st.data())
def test_prune_to_is_exact_for_any_layers(layers, data):
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=layers, max_size=layers))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    weights = {str(i): Layer(torch.randint(-3, 4, (size,), generator=rng).float()) for i, size in enumerate(sizes)}
    masks = {name: torch.rand(layer.shape, generator=rng) < 0.8 for name, layer in weights.items()}
    for mask in masks.values():
        mask[0] = True
    active = sum(map(count, masks.values()))
    n = data.draw(st.integers(layers, active))
    pruned = prune_to(masks, n, weights, magnitude)
    assert sum(map(count, pruned.values())) == n
    for name, mask in pruned.items():
        assert count(mask) >= 1
        assert not (mask & ~masks[name]).any()


def test_prune_to_fewer_than_one_each_is_refused():
    layers = {name: Layer(torch.ones(3)) for name in "abc"}
    with pytest.raises(ValueError, match="at least one"):
        prune_to({name: torch.ones(3, dtype=torch.bool) for name in "abc"}, 2, layers, magnitude)


def test_random_masks_are_exact_and_depend_on_the_seed_alone():
    shapes = {"a": (40, 30), "b": (7, 3, 3, 3), "c": (5, 5)}
    counts = {"a": 123, "b": 1, "c": 25}
    draw = [random_masks(counts, shapes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert {name: count(mask) for name, mask in draw[0].items()} == counts
    assert all(torch.equal(draw[0][name], draw[1][name]) for name in shapes)
    assert not torch.equal(draw[0]["a"], draw[2]["a"])


@cases(st.integers(1, 6), st.integers(1, 8), st.sampled_from([(), (2,), (3, 1)]), st.data())
def test_each_row_has_its_own_best_entries(rows, columns, kernel, data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randint(-3, 4, (rows, columns, *kernel), generator=rng).float()  # with many ties
    among = torch.rand(scores.shape, generator=rng) < 0.7
    n = torch.tensor([data.draw(st.integers(0, count(row))) for row in among])
    chosen = top_of_rows(Layer(scores), magnitude, n, among)
    assert chosen.shape == among.shape and torch.equal(row_counts(chosen), n)
    for i in range(rows):
        expected = naive_top(scores[i].abs().flatten().tolist(), int(n[i]), among[i].flatten().tolist())
        assert chosen[i].flatten().tolist() == expected


def test_rows_without_so_many_candidates_or_with_nan_are_refused():
    among = torch.tensor([[True, False], [True, True]])
    for n in ([2, 1], [-1, 1]):
        with pytest.raises(ValueError, match="cannot select"):
            top_of_rows(Layer(torch.ones(2, 2)), magnitude, torch.tensor(n), among)
    with pytest.raises(NonFiniteScores, match="no row can be ranked"):
        top_of_rows(Layer(torch.tensor([[1.0, 2.0], [3.0, torch.nan]])), magnitude, torch.tensor([0, 1]), among)


def test_random_rows_have_their_fan_in_and_depend_on_the_seed_alone():
    layers = {"a": Layer(torch.zeros(40, 30)), "b": Layer(torch.zeros(7, 3, 3, 3)), "c": Layer(torch.zeros(5, 5))}
    fan_in = {"a": 4, "b": 1, "c": 5}
    draw = [random_rows(fan_in, layers, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert {name: row_counts(mask).unique().tolist() for name, mask in draw[0].items()} == {
        "a": [4],
        "b": [1],
        "c": [5],
    }
    assert all(torch.equal(draw[0][name], draw[1][name]) for name in layers)
    assert not torch.equal(draw[0]["a"], draw[2]["a"])
    assert draw[0]["a"].any(0).all()  # every input is read


def test_in_rows_leaves_the_chosen_rows_alone():
    mask = torch.rand(4, 3, 2) < 0.6
    left = in_rows(mask, torch.tensor([True, False, True, False]))
    assert torch.equal(left[::2], mask[::2]) and not left[1::2].any()


def test_random_growth_is_even():
    """Each inactive entry is grown as often as another: 2,000 draws of 5 of 20, the standard deviation is 19."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(30) < 10
    often = sum(grow_random(mask, 5, rng).int() for _ in range(2000))
    assert (often[:10] == 2000).all()
    assert (often[10:] - 500).abs().max() < 90


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.5])
def test_the_highest_of_a_draw_are_drawn_one_after_another_by_their_scores(sharpness):
    """Of 4,000 draws, the first two of four, in order: within four standard deviations of their probabilities."""
    rng, scores, times = torch.Generator().manual_seed(0), torch.tensor([0.5, 1.0, 2.0, 3.0]), torch.zeros(4, 4)
    for _ in range(4000):
        first, second = draw(scores, rng, sharpness).topk(2).indices.tolist()
        times[first, second] += 1
    p = scores**sharpness / (scores**sharpness).sum()
    expected = 4000 * p[:, None] * (p / (1 - p[:, None])) * (1 - torch.eye(4))
    assert ((times - expected).abs() <= 4 * expected.sqrt()).all()


def test_a_draw_leaves_zeros_to_the_end_and_depends_on_the_seed_alone():
    scores = torch.tensor([0.0, 1e-6, 0.0, 50.0, 0.0, 1.0])
    orders = {tuple(draw(scores, torch.Generator().manual_seed(seed)).argsort().tolist()) for seed in range(50)}
    assert all(set(order[:3]) == {0, 2, 4} for order in orders)
    assert len({order[:3] for order in orders}) == 6
    again = [draw(scores.bfloat16().float(), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again) and again[0].isfinite().all()


def test_some_draws_inactive_entries_uniformly_and_never_more_than_there_are():
    mask = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.1
    active, times = int(mask.sum()), torch.zeros(40, 50)
    for seed in range(400):
        drawn = some(mask, 1.5, seed)
        assert not (drawn & mask).any() and int(drawn.sum()) == int(1.5 * active)
        times += drawn
    expected = 400 * int(1.5 * active) / (2000 - active)
    others = times[~mask]
    assert others.min() > 0.5 * expected and others.max() < 1.6 * expected
    assert torch.equal(some(mask, 100.0, 0), ~mask)
    assert torch.equal(some(mask, 1.5, 7), some(mask, 1.5, 7))


def test_an_exchange_among_drawn_entries_grows_the_largest_gradients_of_these():
    weight = torch.tensor([5.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    grad = torch.tensor([9.0, 9.0, 9.0, 8.0, 1.0, 7.0, 2.0, 6.0])
    mask = weight != 0
    among = torch.tensor([0, 0, 0, 0, 1, 0, 1, 1]).bool()
    layer = Layer(weight, grad)
    by = {"lose": magnitude, "gain": gradient}
    assert exchange(mask, layer, 0.34, among=among, **by).nonzero().flatten().tolist() == [
        0,
        2,
        7,
    ]  # the 1.0 is dropped; 8 and 7 were not drawn
    assert exchange(mask, layer, 1.0, among=among, **by).nonzero().flatten().tolist() == [4, 6, 7]
    few = torch.zeros(8, dtype=torch.bool)
    few[4] = True  # no more are dropped than can be grown
    assert exchange(mask, layer, 1.0, among=few, **by).nonzero().flatten().tolist() == [0, 2, 4]
