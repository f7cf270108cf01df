"""The weight of one layer as its active values alone: what its module shows, and what autograd keeps."""

import copy

import pytest
import torch
from stored_training import Training, batch, network, pair
from torch import nn
from torch.nn import functional as F

import granet
from granet import Sparsifier


def test_a_module_shows_its_dense_weight_and_state_dict():
    dense, sparse = pair("static")
    layer, twin = sparse.model[8], dense.model[8]
    assert isinstance(layer, nn.Linear) and str(layer) == str(twin)
    assert torch.equal(layer.weight, twin.weight) and layer.weight.shape == (40, 24)
    assert list(dict(layer.named_parameters())) == ["values", "bias"]
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.weight.square().sum().backward()  # gradients flow through it, wherever it is read
    assert torch.equal(layer.values.grad, 2 * layer.values.detach())
    assert list(sparse.model.state_dict()) == list(network().state_dict())


def test_a_state_dict_of_another_shape_is_an_error_as_in_torch():
    run = Training("sparse", "static")
    state = run.model.state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for 8.weight"):
        run.model.load_state_dict(state | {"8.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "8.weight"'):
        run.model.load_state_dict({k: v for k, v in state.items() if k != "8.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "8.values"'):
        run.model.load_state_dict(state | {"8.values": torch.zeros(3)})


def test_values_that_change_between_forward_and_backward_are_an_error():
    run = Training("sparse", "static")
    loss = run.loss()
    with torch.no_grad():
        run.model[8].values.add_(1)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        loss.backward()


def test_second_derivatives_are_those_of_dense_storage():
    grads = []
    for run in pair("static"):
        (first,) = torch.autograd.grad(run.loss(), [run.model[8].bias], create_graph=True)
        first.square().sum().backward()
        grads.append(run.model[3].bias.grad)
    torch.testing.assert_close(*grads)


def test_torch_func_computes_gradients():
    run = Training("sparse", "static")
    x, y = batch(0)
    run.model.eval()
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(run.model, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for name, p in run.model.named_parameters():
        (grad,) = torch.autograd.grad(F.cross_entropy(run.model(x), y), p)
        torch.testing.assert_close(each[name].mean(0), grad, rtol=1e-4, atol=1e-6)


def test_one_dense_weight_at_a_time():
    """What autograd keeps for the backward is the values, not the dense weights."""
    run = Training("sparse", "static")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        run.loss().backward()
    assert (40, 24) not in kept and (24, 40) not in kept and (5, 40) not in kept


def test_attention_reads_the_dense_weight_of_its_projection():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    dense, sparse = copy.deepcopy(model), model
    one, other = (
        Sparsifier(m, granet.RigL(sparsity=0.5, end=20, interval=2), storage=s)
        for m, s in ((dense, "dense"), (sparse, "sparse"))
    )
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (dense, sparse)]
    for sparsifier, optimizer in zip((one, other), optimizers, strict=True):
        sparsifier.attach(optimizer)
    assert "in_proj_weight" in one.masks and list(other._stored.modules) == ["out_proj.weight"]
    for step in range(10):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((dense, sparse), optimizers, strict=True):
            m(x, x, x)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in dense.state_dict().items():
            torch.testing.assert_close(value, sparse.state_dict()[name])
    assert one.version == other.version > 0
