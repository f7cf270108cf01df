"""Patterns: which masks are allowed, exact counts in each, and what the rest of granet makes of them."""

from fractions import Fraction
from math import floor, prod

import numpy as np
import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import granet
from granet import Sparsifier, topology
from granet.criterion import Layer, NonFiniteScores, gradient, magnitude, own_values
from granet.distribution import Limited, capacity
from granet.pattern import NM, Block, Channel, Pattern, parse
from granet.selection import plan, select, unfit
from granet.topology import count, exchange, grow, grow_random, prune_to, random_masks, top
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.trainer import Trainer

METHODS = {
    "gmp": lambda s: granet.GMP(sparsity=s, end=12, interval=3),
    "granet": lambda s: granet.GraNet(sparsity=s, initial_sparsity=0.0, end=12, total=20, interval=3),
    "rigl": lambda s: granet.RigL(sparsity=s, end=18, interval=3),
    "set": lambda s: granet.SET(sparsity=s, total=20, interval=3),
}


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 8),
    )


def train(sparsifier, optimizer, steps, each=lambda: None):
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, 6, 6, generator=rng), torch.randint(0, 8, (8,), generator=rng)
        nn.functional.cross_entropy(sparsifier.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        each()


def group_counts(mask, m):
    """How many of each m consecutive inputs are active, by loops."""
    array = np.moveaxis(mask.numpy().reshape(*mask.shape[:2], -1), 1, -1)
    return [int(row[i : i + m].sum()) for rows in array for row in rows for i in range(0, len(row), m)]


def is_legal(mask, pattern):
    """Whether a mask obeys, by loops over its entries."""
    array = mask.numpy()
    match parse(pattern):
        case NM(n, m):
            return max(group_counts(mask, m)) <= n
        case Block(r, c):
            return all(
                array[i - i % r, j - j % c, *rest] == array[i, j, *rest] for i, j, *rest in np.ndindex(array.shape)
            )
        case Channel():
            return all(row.all() or not row.any() for row in array)


# strings


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


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4x1", "4x4", "channel"])
@pytest.mark.parametrize("name", METHODS)
def test_every_mask_is_legal_and_every_count_exact(name, pattern):
    model, method = network(), METHODS[name](0.75)
    sparsifier = Sparsifier(model, method, pattern=pattern, skip=unfit(model, pattern))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    sparsifier.attach(optimizer)
    seen = set()

    def check():
        assert sparsifier.active == sum(map(count, sparsifier.masks.values()))
        if sparsifier.sparsity >= 0.75:
            seen.add(sparsifier.version)
            assert all(is_legal(mask, pattern) for mask in sparsifier.masks.values())

    train(sparsifier, optimizer, 20, check)
    assert seen if name == "gmp" else len(seen) > 1
    if pattern == "1:4":
        assert all(set(group_counts(mask, 4)) == {1} for mask in sparsifier.masks.values())
    if pattern != "channel":
        assert sparsifier.active == sparsifier.total // 4


@pytest.mark.parametrize("name", METHODS)
def test_half_sparsity_is_exactly_two_of_four_in_the_format_of_the_hardware(name):
    """Compressed as sparse tensor cores want it and back, each weight is where it was; that keeps two of each four."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    sparsifier = Sparsifier(model, METHODS[name](0.5), pattern="2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    for step in range(20):
        model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for layer in (model[0], model[2]):
        mask = sparsifier.masks[f"{list(model).index(layer)}.weight"]
        assert set(group_counts(mask, 4)) == {2}
        weight = layer.weight.detach().half().to(device)
        values, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.numel() == weight.numel() // 2
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)
        if device == "cuda":
            x = torch.randn(64, 64, device=device).half()
            packed = torch.sparse.to_sparse_semi_structured(weight)
            torch.testing.assert_close(nn.functional.linear(x, packed), x @ weight.T, rtol=1e-2, atol=1e-2)


def test_dead_channels_are_zero_and_their_output_is_constant():
    model = network()
    method = granet.GMP(sparsity=0.5, end=12, interval=3, scope="layerwise")
    sparsifier = Sparsifier(model, method, pattern="channel")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    sparsifier.attach(optimizer)
    train(sparsifier, optimizer, 20)
    dead = ~sparsifier.masks["0.weight"].flatten(1).any(1)
    alive = sum(int(mask.flatten(1).any(1).sum()) for mask in sparsifier.masks.values())
    assert dead.any() and alive == sparsifier.active_units == 20  # of 16 + 24
    assert not model[0].weight[dead].any()
    assert all(not v[dead].any() for v in optimizer.state[model[0].weight].values() if v.ndim == 4)
    out = model[0](torch.randn(3, 4, 6, 6))
    assert not out[:, dead].any() and out[:, ~dead].any()
    assert "6.weight" not in sparsifier.masks


def test_weights_compete_by_their_means_whatever_the_size_of_a_channel():
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for layer, size in ((model[0], 1.0), (model[1], 2.0)):
            layer.weight.fill_(size)
        model[0].weight[3] = 3.0
    sparsifier = Sparsifier(model, granet.GMP(sparsity=0.375, end=1, interval=1), pattern="channel")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    assert sparsifier.masks["0.weight"][:, 0].tolist() == [False, False, False, True]
    assert sparsifier.masks["1.weight"].all()
    assert (sparsifier.active_units, sparsifier.active, sparsifier.total) == (5, 64 + 16, 256 + 16)


# refusals


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:5", r"'0.weight' of shape \(16, 4, 3, 3\) cannot obey pattern 2:5: its 4 inputs are not a multiple of 5"),
        ("1:8", r"'0.weight' .* its 4 inputs are not a multiple of 8.*skip='0.weight'"),
        ("16x4", r"'4.weight' of shape \(24, 256\) cannot obey pattern 16x4: 24 outputs by 256 inputs are not made"),
    ],
)
def test_a_layer_that_cannot_obey_is_refused_by_name(pattern, message):
    for make in (Sparsifier, plan):
        with pytest.raises(ValueError, match=message):
            make(network(), granet.Static(sparsity=0.9), pattern=pattern)


def test_what_does_not_fit_can_be_left_dense():
    model = network()
    chosen = select(model, skip=unfit(model, "8x8"), pattern="8x8")
    assert {choice.name for choice in chosen if choice.sparse} == {"4.weight", "6.weight"}
    assert chosen[0].reason == "skip=<shapes that 8x8 does not fit>"


def test_unfit_is_nothing_where_everything_fits():
    assert unfit(network(), None) == unfit(network(), "channel") == unfit(network(), "4x4") == ()


@pytest.mark.parametrize(
    "method",
    [
        granet.Static(sparsity=0.4),
        granet.GMP(sparsity=0.49, end=5),
        granet.GraNet(sparsity=0.3, initial_sparsity=0.1, end=5, total=9, scope="layerwise"),
        granet.Dense(),
        granet.GMP(sparsity=0.8, end=5, scope="layerwise", dense_first=True),
    ],
)
def test_a_method_that_ends_too_dense_for_n_of_m_is_refused(method):
    for make in (Sparsifier, plan):
        with pytest.raises(ValueError, match=r"active weights in .* pattern 2:4 allows .*sparsity of 0.5 or more"):
            make(network(), method, pattern="2:4")


def test_methods_that_look_at_single_weights_before_training_are_refused_for_blocks():
    with pytest.raises(ValueError, match=r"SNIP .* cannot obey pattern 4x1"):
        Sparsifier(network(), granet.METHODS["snip"](sparsity=0.9), pattern="4x1")


def test_masks_that_are_found_have_to_obey():
    fixed = granet.METHODS["fixed"]()
    with pytest.raises(ValueError, match=r"'0.weight' does not obey pattern 2:4, and Fixed leaves it as it is"):
        Sparsifier(network(), fixed, pattern="2:4")
    model = network()
    masks = Sparsifier(model, granet.Static(sparsity=0.8), pattern="2:4").masks
    assert all(torch.equal(m, masks[name]) for name, m in Sparsifier(model, fixed, pattern="2:4").masks.items())


def test_snip_obeys_n_of_m():
    model = network()
    probe = granet.Probe(model, [(torch.randn(8, 4, 6, 6), torch.randint(0, 8, (8,)))])
    sparsifier = Sparsifier(model, granet.METHODS["snip"](sparsity=0.5), probe=probe, pattern="2:4")
    assert all(set(group_counts(mask, 4)) == {2} for mask in sparsifier.masks.values())


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.FileStore(str(tmp_path / "store"), 1)
    )
    try:
        model = torch.distributed.fsdp.fully_shard(nn.Sequential(nn.Linear(8, 8)))
        with pytest.raises(
            ValueError, match=r"'0.weight' is sharded, .* only the pattern 'unstructured', not 2:4: leave it dense"
        ):
            Sparsifier(model, granet.Static(sparsity=0.5), pattern="2:4")
    finally:
        torch.distributed.destroy_process_group()


def test_masks_to_start_from_have_to_obey():
    masks = Sparsifier(network(), granet.Static(sparsity=0.9)).masks
    with pytest.raises(ValueError, match=r"masks: '0.weight' does not obey pattern 4x1"):
        Sparsifier(network(), granet.Static(sparsity=0.9), masks=masks, pattern="4x1")
    legal = Sparsifier(network(), granet.Static(sparsity=0.9), pattern="4x1").masks
    again = Sparsifier(network(), granet.Static(sparsity=0.9), masks=legal, pattern="4x1").masks
    assert all(torch.equal(again[name], mask) for name, mask in legal.items())


def test_a_state_of_another_pattern_is_refused():
    state = Sparsifier(network(), granet.Static(sparsity=0.9), pattern="2:4").state_dict()
    with pytest.raises(ValueError, match="obeys pattern 2:4, this sparsifier 1:4"):
        Sparsifier(network(), granet.Static(sparsity=0.9), pattern="1:4").load_state_dict(state)


# what is shown


def test_the_plan_counts_units():
    shown = plan(network(), granet.Static(sparsity=0.75), pattern="8x4")
    rows = {row.name: row for row in shown.rows if row.sparse}
    assert {name: row.units for name, row in rows.items()} == {"0.weight": 18, "4.weight": 192, "6.weight": 6}
    assert shown.sparse_units == 216 and shown.final_active == shown.initial_active == 54
    assert shown.sparse_total == 216 * 32
    sparsifier = Sparsifier(network(), granet.Static(sparsity=0.75), pattern="8x4")
    assert {name: row.initial * 32 for name, row in rows.items()} == sparsifier.counts
    assert (sparsifier.active_units, sparsifier.active) == (54, 54 * 32)
    text = str(shown)
    assert "pattern 8x4" in text and "blocks" in text.splitlines()[2]
    assert "pattern 8x4" in str(sparsifier.report())


def test_the_last_layer_keeps_its_channels_unless_it_is_named():
    model, method = network(), granet.Static(sparsity=0.5)
    rows = {row.name: row for row in plan(model, method, pattern="channel").rows}
    assert not rows["6.weight"].sparse and "the network's outputs" in rows["6.weight"].reason
    assert rows["0.weight"].sparse and rows["4.weight"].initial == 12
    assert {row.name for row in plan(model, method, only="linear", pattern="channel").rows if row.sparse} == {
        "4.weight"
    }
    named = plan(model, method, only=["6.weight", "4"], pattern="channel")
    assert {row.name for row in named.rows if row.sparse} == {"4.weight", "6.weight"}


# recipes


def recipe(pattern, **train):
    values = recipes.load("digits").model_dump()
    values["model"] |= {"pattern": pattern}
    values["method"] |= {"interval": "10it"}
    return validate(values | {"train": values["train"] | {"epochs": 3, "batch_size": 128} | train}, source="test")


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "16x16", "channel"])
def test_a_recipe_reaches_its_target_under_a_pattern(pattern):
    trainer, records = Trainer(recipe(pattern)), []
    assert trainer.fit(record=records.append, save=lambda: None)
    summary = trainer.summary()
    assert trainer.eligible and trainer.best is not None
    assert all(is_legal(mask, pattern) for mask in trainer.sparsifier.masks.values())
    assert summary["pattern"] == pattern
    assert summary["target_sparsity"] == pytest.approx(0.9, abs=0.02 if pattern in ("16x16", "channel") else 1e-3)
    if pattern != "channel":  # whose sizes differ: its target is of channels
        assert summary["sparsity"] == pytest.approx(summary["target_sparsity"])
    assert not [r for r in records if r["kind"] == "eval" and r["eligible"] and r["step"] < trainer.steps // 2]


def test_a_recipe_with_no_pattern_says_where():
    with pytest.raises(ValueError, match=r"model.pattern: there is no pattern '2;4'"):
        recipe("2;4")


def test_given_scores_are_ranked_as_they_are():
    with topology.obeying(NM(1, 2)):
        kept = top(
            [Layer(torch.tensor([[-3.0, -1.0, 2.0, 5.0]]))], own_values, 2, [torch.ones(1, 4, dtype=torch.bool)]
        )[0]
    assert kept.tolist() == [[False, True, False, True]]
