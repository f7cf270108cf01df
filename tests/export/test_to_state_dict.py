import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import granet


def test_any_copy_of_the_model_loads_it(model, x, tmp_path):
    found = granet.export.state_dict(model, x, tmp_path / "model.safetensors")
    assert found.deviation == 0 and found.comparison.examples == 5
    loaded = load_file(found.path)
    assert loaded.keys() == model.state_dict().keys()
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.normal_()
    twin.load_state_dict(loaded)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_tied_tensors_are_stored_under_each_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    granet.export.state_dict(model, torch.ones(1, 4), tmp_path / "tied.safetensors")
    assert torch.equal(load_file(tmp_path / "tied.safetensors")["1.weight"], model[0].weight)


def test_what_is_no_tensor_is_named(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="holds _extra_state, which are no tensors"):
        granet.export.state_dict(Extra(2, 2), torch.ones(1, 2), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
