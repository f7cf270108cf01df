"""Convolutions in sparse storage on the sparse kernels: what they compute on torch's, with as few gradients."""

import copy
import pickle

import pytest
import torch
from fuzz_training import same
from torch import nn
from torch.nn import functional as F

import granet
from granet.engine import stored


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False), nn.ReLU(),
        nn.Conv2d(16, 12, 1), nn.Flatten(2), nn.Conv1d(12, 8, 3, padding=1), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


def batch(step, images=16):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(images, 3, 7, 7, generator=rng), torch.randint(0, 5, (images,), generator=rng)


class Run:
    """A network in sparse storage, accelerated or not."""

    def __init__(self, method=None, *, fast=True, autocast=False):
        self.model = network()
        method = method or granet.Static(sparsity=0.7)
        self.sparsifier = granet.Sparsifier(self.model, method, storage="sparse")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.sparsifier.attach(self.optimizer)
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        self.plan = None
        if fast:
            with self.autocast:
                self.plan = granet.accelerate(self.sparsifier, batch(0)[0])

    def loss(self):
        x, y = batch(self.sparsifier.step)
        with self.autocast:
            return F.cross_entropy(self.model(x).float(), y)

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return self


@pytest.fixture
def calls(monkeypatch):
    """How often a convolution in sparse storage ran on the kernels."""
    seen, run = [], stored.conv
    monkeypatch.setattr(stored, "conv", lambda *a: seen.append(1) or run(*a))
    return seen


def test_outputs_and_gradients_are_those_of_torchs_kernels(always_sparse, precision, calls):
    fast, plain = Run(autocast=precision == "bfloat16"), Run(fast=False, autocast=precision == "bfloat16")
    calls.clear()  # those of the measurements
    grads = []
    with fast.autocast:
        for run in (fast, plain):
            x = batch(0)[0].requires_grad_()
            run.model(x).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in run.model.parameters())])
        for one, other in zip(*grads, strict=True):
            same(one, other, "gradient")
    assert len(calls) == 4
    rows = {row.name: row for row in fast.plan.report().layers}
    assert [name for name, row in rows.items() if row.chosen == "sparse"] == ["0", "3", "5", "7"]
    assert rows["3"].shape == (16, 4, 3, 3)
    assert rows["9"].why == "in sparse storage, where linear layers have kernels of their own"


METHODS = {
    "rigl": granet.RigL(sparsity=0.8, end=12, interval=4),
    "granet": granet.GraNet(sparsity=0.9, initial_sparsity=0.5, end=8, total=12, interval=4),
}


@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_without_the_kernels(method, always_sparse, calls):
    fast, plain = Run(METHODS[method]), Run(METHODS[method], fast=False)
    for _ in range(12):
        fast.step()
        plain.step()
        for name, mask in plain.sparsifier.masks.items():
            assert torch.equal(mask, fast.sparsifier.masks[name]), name
    state = fast.model.state_dict()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    assert calls and fast.sparsifier.version == plain.sparsifier.version > 1
    assert all(p.grad.shape == p.shape for p in fast.model.parameters())


def test_a_gradient_can_be_differentiated_again(always_sparse, calls):
    found = []
    for run in (Run(), Run(fast=False)):
        x = batch(0)[0].requires_grad_()
        (dx,) = torch.autograd.grad(run.model(x).square().sum(), x, create_graph=True)
        values = [run.model[i].values for i in (0, 3, 5, 7)]
        found.append(torch.autograd.grad(dx.square().sum(), values))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert calls


def test_values_that_changed_before_the_backward_are_an_error(always_sparse):
    run = Run()
    loss = run.loss()
    with torch.no_grad():
        run.model[3].values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_and_what_fold_leaves_run_on_torchs_kernels(always_sparse, calls):
    run = Run().step(2)
    x = batch(0)[0]
    run.model.eval()
    expected = run.model(x)
    calls.clear()
    for copied in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        torch.testing.assert_close(copied(x), expected, rtol=1e-4, atol=1e-5)
    run.sparsifier.fold()
    torch.testing.assert_close(run.model(x), expected, rtol=1e-4, atol=1e-5)
    run.plan.remove()
    torch.testing.assert_close(run.model(x), expected, rtol=1e-4, atol=1e-5)
    assert not calls and type(run.model[3].weight) is nn.Parameter
