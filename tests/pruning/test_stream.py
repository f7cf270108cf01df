import copy
import gc

import pytest
import torch
from torch import nn

import granet
from granet.pruning import Wanda, layers, stream

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def one_after_the_other(model, batches, sparsity, groups):
    """Naive Wanda: for each block, the whole model runs, pruned so far."""
    targets = {target.name: target for target in layers.targets(model, None, (), None, True)}
    assert sorted(targets) == sorted(name for names in groups for name in names)
    for names in groups:
        with layers.observed([targets[name] for name in names]) as moments, stream.quiet(model):
            for batch in batches:
                model(**batch)
        for name in names:
            weight = targets[name].matrix()
            n = granet.distribution.budget(weight.numel(), 1 - sparsity)
            targets[name].write(Wanda().prune(weight, moments[name].mean(), n, None))


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        ("llama", ["model.layers."]),
        ("gemma3", ["model.layers."]),
        ("gpt2", ["transformer.h."]),
        ("opt", ["model.decoder.layers."]),
        ("t5", ["encoder.block.", "decoder.block."]),
    ],
)
def test_a_stream_of_blocks_is_the_whole_model_run_for_each_block(make, calibration, kind, lists):
    model = make(kind)
    other = copy.deepcopy(model)
    batches = [{"input_ids": ids} for ids in calibration[:4]]
    if kind == "t5":
        batches = [batch | {"labels": batch["input_ids"].flip(1)} for batch in batches]
    report = granet.prune(model, 0.5, "wanda", batches)
    names = [layer.name for layer in report.layers]
    groups = [[name for name in names if name.startswith(f"{one}{i}.")] for one in lists for i in range(3)]
    assert names == [name for group in groups for name in group]  # and nothing else, embeddings for example
    one_after_the_other(other, batches, 0.5, groups)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert not model.training and model.config.use_cache is other.config.use_cache is not False


def test_only_one_blocks_moments_and_activations_exist_at_a_time(make, calibration):
    model = make("llama")
    pieces = {ids.shape for ids in calibration}
    assert pieces == {(1, 48)}
    seen = []

    def look(done, total):
        assert total == 21
        if done % 7 == 1:  # the first layer of a block has been pruned
            moments = [one for one in gc.get_objects() if type(one) is layers.Moment]
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
            hidden = [one for one in tensors if one.shape == (1, 48, 32)]
            positions = [one for one in tensors if one.shape == (1, 48, 8)]  # sines and cosines, as wide as a head
            assert len(positions) == 2
            seen.append(({one.name.split(".")[2] for one in moments}, len(moments), len(hidden)))

    gc.collect()
    granet.prune(model, 0.5, "sparsegpt", calibration, progress=look)
    assert [names for names, *_ in seen] == [{"0"}, {"1"}, {"2"}]
    assert all(6 <= count <= 7 for _, count, _ in seen)
    assert {count for *_, count in seen} == {len(calibration)}


class Reused(nn.Module):
    """Blocks that are called twice: no chain."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for _ in range(2):
            for block in self.blocks:
                x = block(x).relu()
        return self.head(x)


class Skipping(Reused):
    """Something happens between the blocks."""

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Backwards(Reused):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Reused, Skipping, Backwards])
def test_what_is_no_chain_is_pruned_layer_by_layer(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(64, 8)
    other = copy.deepcopy(model)
    report = granet.prune(model, 0.5, "wanda", [x[:32], x[32:]])
    order = [0, 1, 2] if kind is not Backwards else [2, 1, 0]
    names = [*(f"blocks.{i}.weight" for i in order), "head.weight"]
    assert [layer.name for layer in report.layers] == names
    assert {layer.tokens for layer in report.layers[:3]} == {128 if kind is Reused else 64}
    one_after_the_other(other, [{"x": x}], 0.5, [[name] for name in names])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_sequential_is_streamed_and_what_works_in_place_harms_nothing():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(8, 8)) for _ in range(3)]
    model, x = nn.Sequential(nn.Linear(8, 8), *blocks), torch.randn(64, 8)
    other = copy.deepcopy(model)
    (call,) = stream.calls(x, torch.device("cpu"))
    targets = layers.targets(model, None, (), None, True)
    (chain,) = stream.order(model, call, targets)
    assert [stage.name for stage in chain] == ["0", "1", "2", "3"]
    granet.prune(model, 0.5, "wanda", [{"input": x}])
    one_after_the_other(other, [{"input": x}], 0.5, [["0.weight"], ["1.1.weight"], ["2.1.weight"], ["3.1.weight"]])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Remembering(nn.Linear):
    """Adds what it gave the last time."""

    last = 0.0

    def forward(self, x):
        self.last = super().forward(x) + self.last
        return self.last


def test_blocks_that_remember_are_refused():
    model = nn.Sequential(Remembering(8, 8), Remembering(8, 8))
    with pytest.raises(ValueError, match="a Remembering gives other outputs when it is run a second time"):
        granet.prune(model, 0.5, "wanda", torch.randn(4, 8))
    assert model[0].weight.all()


def test_a_list_with_everything_in_one_block_is_not_taken_for_a_chain():
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    model = nn.Sequential(nn.Linear(8, 8), blocks, nn.Linear(8, 4))
    targets = layers.targets(model, None, (), None, True)
    stages = stream.order(model, ((torch.randn(2, 8),), {}), targets)
    assert [[stage.name for stage in chain] for chain in stages] == [
        ["0.weight"],
        ["1.0", "1.1", "1.2", "1.3"],
        ["2.weight"],
    ]


def test_a_model_is_as_it_was_after_an_error(make, calibration):
    model = make("llama").train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.model.norm.weight.zero_()  # harmless, behind the blocks
        model.model.embed_tokens.weight[32] = float("nan")  # a space
    with pytest.raises(ValueError, match="activations are NaN or infinite on calibration batch 0"):
        granet.prune(model, 0.5, "wanda", calibration)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if ".layers." in name)
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert model.config.use_cache
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no calibration data"),
        (["text"], "calibration batch is the text 'text'"),
        ([None], "calibration batch is None"),
    ],
)
def test_calibration_data_of_the_wrong_kind(given, message):
    with pytest.raises(ValueError, match=message):
        granet.prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.5, "wanda", given)


class Named(nn.Module):
    """Takes and returns a dict, in which no activations are looked for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return {"hidden": self.layer(x["hidden"] if isinstance(x, dict) else x)}


def test_blocks_that_return_no_tensor_are_pruned_while_the_whole_model_runs(caplog):
    torch.manual_seed(0)
    model, x = nn.Sequential(Named(), Named(), Named()), torch.randn(64, 8)
    other = copy.deepcopy(model)
    with caplog.at_level("INFO", logger="granet"):
        report = granet.prune(model, 0.5, "wanda", x)
    assert "3 layers are in no list of blocks" in caplog.text
    one_after_the_other(other, [{"input": x}], 0.5, [[layer.name] for layer in report.layers])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
