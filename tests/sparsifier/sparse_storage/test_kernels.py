"""Linear layers in sparse storage on granet's kernels: what dense weights give, up to rounding."""

import io

import pytest
import torch
from stored_training import METHODS, STEPS, Training, batch, pair
from torch.nn import functional as F

import granet
from granet import native
from granet.sparsifier.sparse_storage import linear


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Every linear layer on the kernels, up to a density that they are never reached by."""
    if not native.available():
        pytest.skip("the native kernels cannot be compiled here")
    monkeypatch.setattr(linear, "DENSEST", {torch.float32: 1.0, torch.bfloat16: 1.0})
    calls = []
    before = linear._on_kernels
    monkeypatch.setattr(linear, "_on_kernels", lambda *a: before(*a) and not calls.append(1))
    yield
    assert calls, "no layer ran on the kernels"


def layer_of(outputs, inputs, density):
    """A layer in sparse storage that has so many active weights, and its dense weight and mask."""
    layer = torch.nn.Linear(inputs, outputs)
    model = torch.nn.Sequential(layer)
    masks = {"0.weight": torch.rand(outputs, inputs) < density}
    masks["0.weight"][outputs // 2, inputs // 2] = True
    sparsifier = granet.Sparsifier(model, granet.Fixed(), masks=masks, storage="sparse")
    return layer, sparsifier.masks["0.weight"]


@pytest.mark.parametrize("images, inputs, outputs", [(130, 4096, 64), (1, 5, 3), (0, 9, 5)])
def test_products_are_those_of_the_dense_weight(images, inputs, outputs):
    layer, mask = layer_of(outputs, inputs, 0.1)
    x = torch.randn(images, inputs).requires_grad_()
    whole = layer.weight.detach().double().requires_grad_()
    twin, bias = x.detach().double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    y, expected = layer(x), F.linear(twin, whole, bias)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-4)
    dy = torch.randn(images, outputs)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(x.grad, twin.grad.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.values.grad, whole.grad[mask].float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, bias.grad.float(), rtol=1e-5, atol=1e-4)


@pytest.fixture
def one_thread_again():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(one_thread_again):
    layer, _ = layer_of(200, 3000, 0.1)
    x, dy, found = torch.randn(70, 3000), torch.randn(70, 200), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        found.append([y.detach(), *torch.autograd.grad(y, [leaf, layer.values], dy)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("needs", ["input", "values", "neither"])
def test_gradients_that_nobody_needs_are_left_out(needs):
    layer, _ = layer_of(30, 20, 0.3)
    layer.values.requires_grad_(needs == "values")
    x = torch.randn(2, 3, 20, requires_grad=needs == "input")
    y = layer(x)
    assert y.shape == (2, 3, 30)
    y.square().sum().backward()
    assert (x.grad is not None) == (needs == "input") and (layer.values.grad is not None) == (needs == "values")
    assert layer.bias.grad is not None


def test_an_input_in_another_order_of_memory_and_products_in_bfloat16():
    layer, mask = layer_of(40, 24, 0.2)
    whole = layer.weight.detach().clone().requires_grad_()
    x = torch.randn(24, 6).t().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), F.linear(twin, whole, layer.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    dy = torch.randn(40, 6).t().bfloat16()
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad, rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.values.grad, whole.grad[mask], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_masks_are_those_of_dense_storage_and_weights_are_up_to_rounding(method, optimizer):
    dense, sparse = pair(method, optimizer)
    for _ in range(STEPS):
        dense.step()
        sparse.step()
        for name, mask in dense.sparsifier.masks.items():
            assert torch.equal(mask, sparse.sparsifier.masks[name]), name
    state = sparse.model.state_dict()
    for name, value in dense.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(method):
    whole = Training("sparse", method, "adamw").step(10)
    file = io.BytesIO()
    torch.save({name: getattr(whole, name).state_dict() for name in ("model", "optimizer", "sparsifier")}, file)
    file.seek(0)
    resumed = Training("sparse", method, "adamw", seed=7)
    for name, state in torch.load(file, weights_only=True).items():
        getattr(resumed, name).load_state_dict(state)
    whole.step(STEPS - 10)
    resumed.step(STEPS - 10)
    other = resumed.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.model.state_dict().items())


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


def test_no_dense_weight_is_made_between_updates(monkeypatch):
    made, whole = [], linear.dense
    monkeypatch.setattr(linear, "dense", lambda *a: made.append(a[2]) or whole(*a))
    run = Training("sparse", "rigl").step(3)
    assert not made
    run.step()  # with an update, whose dense gradient is made in pieces
    assert made


def test_densities_decide_and_nothing_else(monkeypatch):
    monkeypatch.setattr(linear, "DENSEST", {torch.float32: 0.1})
    sparse, dense = layer_of(40, 40, 0.05)[0], layer_of(40, 40, 0.5)[0]
    x = torch.randn(2, 40)
    assert linear.is_for(sparse, (40, 40), x) and not linear.is_for(dense, (40, 40), x)
    assert not linear.is_for(sparse, (40, 40), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not linear.is_for(sparse, (40, 40), x)
    assert F.mse_loss(sparse(batch(0)[0].flatten(1)[:, :40]), torch.zeros(16, 40)) > 0


def test_positions_and_values_that_do_not_fit_are_refused():
    layer_of(3, 3, 1.0)[0](torch.randn(1, 3))
    x, values, positions = torch.randn(2, 4), torch.randn(3), torch.tensor([0, 5, 12], dtype=torch.int32)  # of 16
    for wrong, message in (
        ((x, values, positions, None, 3), "positions do not fit"),
        ((x, values[:2], positions, None, 4), "there are 2 values at 3 positions"),
        ((x.double(), values, positions, None, 4), "input must be a contiguous float32"),
        ((x, values, positions, torch.randn(3), 4), "bias has 3 elements"),
        ((x, values, positions.long(), None, 4), "contiguous int32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.granet.stored_forward(*wrong)
