import copy

import pytest
import torch
from torch import nn

import granet
from granet.export import ExportError
from granet.export.network import Network


def test_the_model_stays_as_it_is(model, x):
    model.train()
    before = copy.deepcopy(model.state_dict())
    network = Network(model.double(), x.double())
    network.program()
    assert model.training and next(model.parameters()).dtype == torch.float64
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())
    assert not network.model.training and network.example[0].dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 4])
def test_a_program_takes_any_batch(model, x, batch):
    network = Network(model, x[:batch])
    program = network.program().module()
    for size in (1, 2, 3):
        torch.testing.assert_close(program(x[:size]), network((x[:size],)))


def test_a_compiled_model_is_exported_like_the_model_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    compiled = granet.compile(model, torch.ones(2, 8))  # its forward takes *inputs
    program = Network(compiled, torch.ones(2, 8)).program().module()
    torch.testing.assert_close(program(torch.ones(3, 8)), model(torch.ones(3, 8)))


def test_a_model_for_one_batch_size_says_so(x):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, -1) if x.shape[0] == 4 else x

    with pytest.raises(ExportError, match="for any batch size"):
        Network(Fixed(), x).program()
    assert Network(Fixed(), x).program(any_batch=False).module()(x).shape == (4, 192)


def test_effective_weights_are_exported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    sparsifier = granet.Sparsifier(model, granet.TopKAST(sparsity=0.75))
    network = Network(model, torch.ones(2, 8))
    torch.testing.assert_close(network((torch.ones(2, 8),)), model(torch.ones(2, 8)))
    assert (network.model[0].weight == 0).sum() > 0 and (dict(model.named_parameters())["0.weight"] != 0).all()
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("example", [None, (), torch.tensor(1.0), torch.ones(0, 3), [torch.ones(2, 3)]])
def test_an_example_that_is_none(model, example):
    with pytest.raises(ValueError, match="give a tensor or a tuple of tensors"):
        Network(model, example)


def test_weights_that_are_not_finite_are_named(model, x):
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.weight holds NaN"):
        Network(model, x)
    with pytest.raises(ValueError, match=r"a torch\.nn\.Module can be exported"):
        Network(torch.relu, x)


def test_batches_must_look_like_the_example(model, x):
    network = Network(model, x)
    assert network.arguments((x[:1], torch.tensor([3])))[1].tolist() == [3]
    assert network.arguments([x, torch.rand(4)])[1] is None
    for batch in (x[:, :2], x.long(), x[0]):
        with pytest.raises(ValueError, match="only the first axis may differ"):
            network.arguments(batch)
    with pytest.raises(ValueError, match="the model takes 1 tensors"):
        network.arguments("x")
