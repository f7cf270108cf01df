"""What of a model is stored: weights as the network computes with them, wherever their zeros came from."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import granet
from granet.storage import contents


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))


def test_masks_of_torchs_pruning_are_applied_under_plain_names():
    model = net()
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[2], "bias", 0.5)
    found = contents.tensors_of(model)
    assert found.keys() == net().state_dict().keys() != model.state_dict().keys()
    prune.remove(model[0], "weight")
    prune.remove(model[2], "bias")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


class Masked(nn.Module):
    """As torch.ao.pruning's FakeSparsity."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.mask * x


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_masks_of_prepared_models_are_applied_and_other_parametrizations_stay():
    model = net()
    parametrize.register_parametrization(model[0], "weight", Masked(torch.arange(30) % 2 * torch.ones(20, 30)))
    parametrize.register_parametrization(model[2], "weight", Doubled())
    found = contents.tensors_of(model)
    assert torch.equal(found["0.weight"], model[0].weight)
    assert torch.equal(found["2.parametrizations.weight.original"], model[2].parametrizations.weight.original)
    assert set(found) == {"0.weight", "0.bias", "2.bias", "2.parametrizations.weight.original"}


def test_buffers_that_are_called_masks_are_left_alone():
    model = nn.Linear(3, 3)
    model.register_buffer("causal_mask", torch.ones(3, 3))
    assert set(contents.tensors_of(model)) == {"weight", "bias", "causal_mask"}


def test_effective_weights_are_stored_and_parameters_of_the_method_are_not():
    model = net()
    sparsifier = granet.Sparsifier(model, granet.TopKAST(sparsity=0.8))
    for given in (model, sparsifier, torch.compile(model, backend="eager")):
        found = contents.tensors_of(given)
        assert found.keys() == net().state_dict().keys()
        assert int((found["0.weight"] != 0).sum()) == sparsifier.counts["0.weight"]


def test_what_is_said_of_a_model():
    model = net()
    model[0].weight.data[:10] = 0
    plain = contents.about(model, model.state_dict())
    assert plain == {"granet": granet.__version__, "method": None, "sparsity": 300 / 680, "pattern": None}
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, end=10, interval=2), pattern="1x2")
    said = contents.about(model, model.state_dict())
    assert said["method"] == repr(sparsifier.method) and said["pattern"] == "1x2"
    assert said["sparsity"] == 1 - sparsifier.active / sparsifier.total
    assert contents.about(sparsifier, model.state_dict()) == said


class Strange(torch.Tensor):
    pass


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_what_cannot_be_stored_is_named():
    cases = {
        "'_extra_state' is a dict": Extra(2, 2),
        "'weight' is on the meta device": nn.Linear(2, 2, device="meta"),
        "'w' has the layout torch.sparse_coo": {"w": torch.ones(2, 2).to_sparse()},
        "'weight' has no shape yet": nn.LazyLinear(3),
        "'w' is a Strange, and plain tensors are needed": {"w": torch.ones(2).as_subclass(Strange)},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            contents.tensors_of(given)
    with pytest.raises(TypeError, match="a list was given: a model, a Sparsifier or a state dict is needed"):
        contents.tensors_of([1])


class Made(nn.Linear):
    def state_dict(self, *args, **options):
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **options).items()}


def test_a_model_that_makes_its_state_anew_is_not_loaded_into():
    with pytest.raises(ValueError, match="'weight' is no parameter or buffer of the model"):
        contents.targets_of(Made(2, 2))
    with pytest.raises(TypeError, match="into= is a dict"):
        contents.targets_of({})
