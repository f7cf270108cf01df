"""Which parameters are sparse, and the plan that says so."""

import pytest
import torch
from torch import nn

import granet
from granet.selection import plan, select


class Everything(nn.Module):
    """One of every kind of layer that has weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 8, 3, groups=2)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)
        self.batch = nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(5, 7)
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.place = nn.Parameter(torch.zeros(9, 16))


def sparse(model, **filters):
    return {choice.name for choice in select(model, **filters) if choice.sparse}


DEFAULT = {
    "conv1.weight",
    "conv2.weight",
    "conv3.weight",
    "up.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "shared.weight",
}


def test_weights_of_layers_are_sparse_and_the_rest_is_dense():
    assert sparse(Everything()) == DEFAULT


def test_every_parameter_comes_once_with_a_reason():
    model = Everything()
    choices = {choice.name: choice for choice in select(model)}
    assert list(choices) == [name for name, _ in model.named_parameters()]
    assert choices["shared.weight"].aliases == ("again.weight",)
    assert choices["embed.weight"].aliases == ("head.weight",)
    assert choices["embed.weight"].reason == "tied to an embedding as embed.weight"
    assert choices["place"].reason == "Everything is no known kind of layer; name it in only= to include it"
    assert choices["norm.weight"].reason == "bias, scale or other vector"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"only": "linear"}, {"attention.out_proj.weight", "shared.weight", "embed.weight"}),
        ({"only": nn.Conv2d}, {"conv2.weight"}),
        ({"only": ["conv?", "up"]}, {"conv1.weight", "conv2.weight", "conv3.weight", "up.weight"}),
        ({"only": "attention*"}, {"attention.in_proj_weight", "attention.out_proj.weight"}),
        ({"only": "place"}, {"place"}),
        ({"only": ["norm", "shared.weight"]}, {"norm.weight", "batch.weight", "shared.weight"}),
        ({"only": lambda name, module, p: p.ndim == 5}, {"conv3.weight"}),
        ({"skip": ["conv", "recurrent"]}, DEFAULT - {n for n in DEFAULT if "conv" in n or "lstm" in n or "up" in n}),
        ({"skip": "again.weight"}, DEFAULT - {"shared.weight"}),
        ({"only": "linear", "skip": "embedding"}, {"attention.out_proj.weight", "shared.weight"}),
    ],
)
def test_filters(filters, expected):
    assert sparse(Everything(), **filters) == expected


def test_a_filter_that_matches_nothing_names_what_is_near():
    with pytest.raises(
        ValueError, match=r"skip='shard.weight' matches no parameter.*the nearest names are: shared.weight"
    ):
        select(Everything(), skip="shard.weight")
    with pytest.raises(ValueError, match=r"only='conv9\.\*' matches no parameter"):
        select(Everything(), only=["conv9.*"])


def test_a_model_without_a_sparse_parameter_is_refused():
    with pytest.raises(ValueError, match="no parameter of LayerNorm is sparse"):
        select(nn.LayerNorm(4))


def test_a_parameter_without_a_shape_is_refused():
    with pytest.raises(ValueError, match="has no shape yet"):
        select(nn.Sequential(nn.LazyLinear(4)))


@pytest.mark.parametrize(
    "method",
    [
        granet.Static(sparsity=0.9),
        granet.GMP(sparsity=0.9, end=10, interval=5),
        granet.GMP(sparsity=0.9, end=10, interval=5, scope="layerwise"),
        granet.GraNet(sparsity=0.9, end=10, total=20, interval=5, scope="layerwise"),
    ],
)
def test_the_plan_is_what_happens(method):
    model = Everything()
    shown = plan(model, method)
    sparsifier = granet.Sparsifier(model, method)
    assert {row.name: row.initial for row in shown.rows if row.sparse} == sparsifier.counts
    assert (shown.sparse_total, shown.initial_active) == (sparsifier.total, sparsifier.active)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(20):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert sparsifier.active == shown.final_active
    final = {row.name: row.final for row in shown.rows if row.sparse}
    if None not in final.values():
        assert final == sparsifier.counts
    text = str(shown)
    assert all(name in text for name, _ in model.named_parameters())
    assert f"{shown.final_active:,}" in text


@pytest.mark.parametrize(
    "method", [granet.GMP(sparsity=0.99, end=10, interval=5), granet.SNIP(sparsity=0.99), granet.SynFlow(sparsity=0.99)]
)
def test_a_shared_budget_too_small_for_all_layers_is_refused_at_once(method):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match=r"leaves 0 active weights for 3 layers.*lower sparsity"):
        plan(model, method)
    with pytest.raises(ValueError, match="lower sparsity"):
        granet.Sparsifier(model, method)


def test_a_sparsity_that_would_empty_layers_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="at least one"):
        granet.Sparsifier(model, granet.Static(sparsity=0.95))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
