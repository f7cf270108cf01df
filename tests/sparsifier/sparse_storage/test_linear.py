"""Large linear layers from their values, a few rows of the weight dense at a time: what whole weights would give.

What the kernels compute is tested in test_kernels.py.
"""

import pytest
import torch
from stored_training import METHODS, Training, batch, network, pair
from torch import nn
from torch.nn import functional as F

import granet
from granet.sparsifier.sparse_storage import gradients, linear
from granet.sparsifier.sparse_storage import weight as stored


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 100)  # four rows of 24 inputs; the layers have 960 and 200 weights
    monkeypatch.setattr(gradients, "BLOCK", 10)
    monkeypatch.setattr(linear, "DENSEST", {})


@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_those_of_dense_storage(method):
    dense, sparse = pair(method, doubles=True)
    for step in range(24):
        for run in (dense, sparse):
            x, y = batch(step)
            F.cross_entropy(run.model(x.double()), y).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        for name, mask in dense.sparsifier.masks.items():
            assert torch.equal(mask, sparse.sparsifier.masks[name]), name
    state = sparse.model.state_dict()
    for name, value in dense.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
def test_outputs_and_gradients_are_those_of_the_whole_weight(bf16):
    run = Training("sparse", "static")
    layer, kind = run.model[8], torch.bfloat16 if bf16 else torch.float32
    whole = layer.weight.detach().clone().requires_grad_()
    x, y = torch.randn(2, 3, 24).requires_grad_(), None
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y, expected = layer(x), F.linear(twin, whole, layer.bias)
    assert y.dtype == kind and y.shape == (2, 3, 40)
    tolerance = {"rtol": 0.02, "atol": 0.02} if bf16 else {}
    torch.testing.assert_close(y, expected, **tolerance)
    g = torch.randn(2, 3, 40).to(kind)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, twin.grad, **tolerance)
    at = layer.positions.long()
    torch.testing.assert_close(layer.values.grad, whole.grad.view(-1)[at], **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, whole, layer.bias))


def test_no_dense_tensor_of_the_weights_size_is_made(monkeypatch):
    made = []
    whole = linear.dense
    monkeypatch.setattr(linear, "dense", lambda *a: made.append(a[2]) or whole(*a))
    run = Training("sparse", "rigl").step(3)  # no update is due in these
    assert {shape for shape in made if shape[1] == 24} == {(4, 24)}
    assert max(rows * inputs for rows, inputs in made) <= 100
    run.step(2)


def test_second_derivatives_and_changed_values():
    grads = []
    for run in pair("static"):
        (first,) = torch.autograd.grad(run.loss(), [run.model[8].bias], create_graph=True)
        first.square().sum().backward()
        grads.append([run.model[3].bias.grad, run.model[8].bias.grad])
    torch.testing.assert_close(*grads)
    loss = run.loss()
    with torch.no_grad():
        run.model[8].values.add_(1)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        loss.backward()


def test_the_second_derivative_by_the_values_is_that_of_dense_storage():
    """The penalty on a gradient reaches the weights through the layer's own product."""
    found = []
    for run in pair("static"):
        layer = run.model[10]
        own = dict(layer.named_parameters()).get("values", layer.weight)
        x = torch.ones(3, 40, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (grad,) = torch.autograd.grad(dx.square().sum(), own)
        shape = stored.shape_of(layer)
        found.append(grad[run.sparsifier.masks["10.weight"]] if shape is None else grad)
    torch.testing.assert_close(*found)


def test_a_gradient_that_is_not_finite_is_an_error_and_the_input_still_gets_its_own():
    run = Training("sparse", "rigl").step(3)
    x, y = batch(3)
    loss = F.cross_entropy(run.model(x), y) * float("nan")
    loss.backward()
    assert run.model[3].bias.grad.isnan().any()
    with pytest.warns(RuntimeWarning, match="topology update at step 4 skipped"):
        run.optimizer.step()


def test_a_frozen_layer_passes_gradients_on():
    model = network()
    granet.Sparsifier(model, granet.Static(sparsity=0.8), storage="sparse")
    model[8].requires_grad_(False)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    assert model[8].values.grad is None and model[0].values.grad.abs().sum() > 0


@pytest.mark.parametrize("n", [0, 1, 7, 60])
def test_the_largest_entries_of_pieces_are_those_of_the_whole(n):
    rng = torch.Generator().manual_seed(n)
    grad = torch.randint(-6, 7, (120,), generator=rng).float()  # many ties
    mask = torch.rand(120, generator=rng) < 0.2
    active = mask.nonzero().squeeze(1).int()
    pieces = ((start, grad[start : start + 17]) for start in range(0, 120, 17))
    found = gradients._largest((10, 12), pieces, active, n)
    best = granet.topology.top([granet.criterion.Layer(grad)], granet.criterion.magnitude, n, [~mask])[0]
    assert torch.equal(found.positions.long(), (best | mask).nonzero().squeeze(1))
    assert torch.equal(found.values, grad[best | mask])


def test_a_module_with_a_forward_of_its_own_keeps_it():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(24, 40))
    granet.Sparsifier(model, granet.Static(sparsity=0.5), only=["0.weight"], storage="sparse")
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x), 2 * F.linear(x, model[0].weight, model[0].bias))


def test_exploration_keeps_the_gradients_of_active_and_drawn_weights_alone():
    run = Training("sparse", "rigl explore").step(3)
    run.loss().backward()
    found = run.sparsifier._stored._gradients.found
    assert sorted(found) == sorted(run.sparsifier.masks)
    for name, gradient in found.items():
        active = run.sparsifier.counts[name]
        assert len(gradient.positions) == active + active // 2
        assert run.sparsifier.masks[name].view(-1)[gradient.positions.long()].sum() == active
    before = dict(run.sparsifier.masks)
    run.optimizer.step()
    for name, gradient in found.items():
        grown = (run.sparsifier.masks[name] & ~before[name]).view(-1).nonzero().squeeze(1)
        assert torch.isin(grown, gradient.positions.long()).all()
    assert run.sparsifier.last_update.changed
