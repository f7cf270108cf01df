"""Training under patterns: masks are legal, counts exact, and what cannot obey is refused."""

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import granet
from granet import Sparsifier
from granet.selection import plan, select, unfit
from granet.topology import count
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.trainer import Trainer
from pattern_checks import group_counts, is_legal, network

METHODS = {
    "gmp": lambda s: granet.GMP(sparsity=s, end=12, interval=3),
    "granet": lambda s: granet.GraNet(sparsity=s, initial_sparsity=0.0, end=12, total=20, interval=3),
    "rigl": lambda s: granet.RigL(sparsity=s, end=18, interval=3),
    "set": lambda s: granet.SET(sparsity=s, total=20, interval=3),
}


def train(sparsifier, optimizer, steps, each=lambda: None):
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, 6, 6, generator=rng), torch.randint(0, 8, (8,), generator=rng)
        nn.functional.cross_entropy(sparsifier.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        each()


# strings


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
