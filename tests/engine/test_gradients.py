import copy
import gc

import pytest
import torch
from torch import nn

import granet
from granet.engine import gradients


@pytest.fixture
def layer(always_sparse):
    torch.manual_seed(0)
    model = nn.Linear(64, 48)
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, end=100, interval=3))
    granet.accelerate(sparsifier, torch.randn(8, 64))
    return model, sparsifier


def expected(model, sparsifier, x):
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(x).square().sum().backward()
    return twin.weight.grad * sparsifier.masks["weight"]


def gradient(model, x):
    return torch.autograd.grad(model(x).square().sum(), model.weight)[0]


def test_a_gradient_that_somebody_holds_never_changes(layer):
    model, sparsifier = layer
    held, copies = [], []
    for i in range(6):
        x = torch.randn(8, 64)
        found = gradient(model, x)
        torch.testing.assert_close(found, expected(model, sparsifier, x), atol=1e-4, rtol=1e-4)
        held.append([found, found.view(-1), found[3:5], found.numpy(), found.untyped_storage(), found.detach()][i])
        copies.append(found.clone())
        del found
        gc.collect()
    for i, (kept, before) in enumerate(zip(held, copies, strict=True)):
        if i == 4:
            kept = torch.empty(0).set_(kept, 0, before.shape)
        kept = torch.as_tensor(kept)
        assert torch.equal(kept.flatten(), before[3:5].flatten() if i == 2 else before.flatten())


def test_memory_that_nobody_holds_is_used_again(layer):
    model, sparsifier = layer
    places = set()
    for _ in range(5):
        x = torch.randn(8, 64)
        found = gradient(model, x)
        places.add(found.data_ptr())
        torch.testing.assert_close(found, expected(model, sparsifier, x), atol=1e-4, rtol=1e-4)
        found.add_(1)  # an own use of it, which must not be seen in the next one
        del found
    assert len(places) == 1


def test_parameters_take_the_gradient_without_a_copy_and_accumulate(layer):
    model, sparsifier = layer
    xs = [torch.randn(8, 64) for _ in range(3)]
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        for x in xs:
            model(x).square().sum().backward()
        assert model.weight.grad.untyped_storage().nbytes() == 4 * model.weight.numel()
        total = sum(expected(model, sparsifier, x) for x in xs)
        torch.testing.assert_close(model.weight.grad, total, atol=1e-3, rtol=1e-4)
    model.zero_grad(set_to_none=False)  # zeroed in place and kept
    model(xs[0]).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, expected(model, sparsifier, xs[0]), atol=1e-3, rtol=1e-4)
    kept = []
    handle = model.weight.register_hook(kept.append)
    for x in xs:
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
    handle.remove()
    for x, found in zip(xs, kept, strict=True):
        torch.testing.assert_close(found, expected(model, sparsifier, x), atol=1e-3, rtol=1e-4)


def test_nothing_is_left_of_an_earlier_topology(layer):
    model, sparsifier = layer
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(10):
        x = torch.randn(8, 64)
        if not sparsifier.dense_grad_due:
            for _ in range(2):  # the second one in the memory of the first, which nobody changed
                found = gradient(model, x)
                torch.testing.assert_close(found, expected(model, sparsifier, x), atol=1e-3, rtol=1e-4)
                del found
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.version >= 2


def test_shared_memory_is_not_used_again(layer):
    model, _ = layer
    found = gradient(model, torch.randn(8, 64)).share_memory_()
    place = found.data_ptr()
    del found
    assert gradient(model, torch.randn(8, 64)).data_ptr() != place


def test_the_memory_goes_with_the_weight(layer):
    weight = nn.Parameter(torch.zeros(4))
    gc.collect()
    before = len(gradients._buffers)
    gradients.dense(torch.ones(1), torch.tensor([2], dtype=torch.int32), weight)
    assert len(gradients._buffers) == before + 1
    del weight
    gc.collect()
    assert len(gradients._buffers) == before
