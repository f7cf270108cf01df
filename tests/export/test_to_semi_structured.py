import copy

import pytest
import torch
from torch import nn

import granet
from granet.export.to_semi_structured import obeys

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    granet.Sparsifier(model, granet.Static(sparsity=0.5, distribution="uniform"), pattern="2:4")
    return model


def test_layers_of_the_pattern_are_found(linear):
    assert [obeys(module) for module in linear] == [True, False, True]
    with torch.no_grad():
        linear[0].weight[3, :3] = 1
    assert not obeys(linear[0])
    assert not obeys(nn.Linear(6, 4)) and not obeys(nn.Conv2d(4, 4, 1))


@pytest.mark.skipif(GPU, reason="there is a GPU with sparse tensor cores")
def test_without_a_gpu_it_says_so(linear):
    with pytest.raises(ValueError, match=r"compute capability 8\.0 .*, and this machine has none; 2 layers"):
        granet.export.semi_structured(linear, torch.randn(4, 128))


@pytest.mark.skipif(not GPU, reason="needs a GPU with sparse tensor cores")
def test_outputs_are_those_of_the_dense_model(linear):
    x = torch.randn(64, 128)
    made = granet.export.semi_structured(linear, x)
    with torch.no_grad():
        torch.testing.assert_close(made(x.cuda().half()).float().cpu(), linear(x), atol=0.02, rtol=0.02)
    assert type(made[0].weight.data) is not torch.Tensor


def test_models_without_such_weights(linear):
    with pytest.raises(ValueError, match='train with pattern="2:4"'):
        granet.export.semi_structured(nn.Linear(8, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"torch\.int8 is not possible"):
        granet.export.semi_structured(copy.deepcopy(linear), torch.ones(1, 128), dtype=torch.int8)
