"""Every optimizer of torch, alone and beside another: inactive weights and their buffers are zero after each step."""

import inspect

import pytest
import torch
from small_training import granet_method, nonzero_inactive, three_layers, train_steps
from torch import nn

import granet
from granet import Sparsifier, Static

ELEMENTWISE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
MIXING = {  # these move inactive weights, or fill their buffers, even when the gradient there is zero
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}
MATRIX = [p for p in ("Muon",) if hasattr(torch.optim, p)]


@pytest.mark.parametrize("name", [*ELEMENTWISE, *MIXING])
def test_the_state_is_clean_after_every_step_of_any_optimizer(name):
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = {**ELEMENTWISE, **MIXING}[name](model.parameters())
    sparsifier.attach(optimizer)
    for step in range(30):
        train_steps(model, optimizer, 1, seed=step)
        assert nonzero_inactive(sparsifier, optimizer) == 0
    assert sparsifier.step == 30
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sparsifier._attached.kept is (name in ELEMENTWISE)


def test_every_optimizer_of_torch_is_among_those_tested():
    """The list grows with torch: an optimizer that torch adds has to be tried."""
    ours = {type(make([nn.Parameter(torch.ones(2, 2))])).__name__ for make in {**ELEMENTWISE, **MIXING}.values()}
    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert classes - ours - {"Optimizer", "SparseAdam", "LBFGS", "Muon"} == set()


@pytest.mark.parametrize("name", MATRIX)
def test_an_optimizer_that_mixes_coordinates_beside_another(name):
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    matrices = [p for p in model.parameters() if p.ndim == 2]
    pair = (
        getattr(torch.optim, name)(matrices, lr=0.02),
        torch.optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.1),
    )
    sparsifier.attach(*pair)
    for step in range(30):
        rng = torch.Generator().manual_seed(step)
        model(torch.randn(16, 12, generator=rng)).square().mean().backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        assert nonzero_inactive(sparsifier, *pair) == 0
    assert sparsifier.step == 30
    assert sparsifier._attached.kept is False


def test_lbfgs_with_its_closure():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method(total=12, end=9))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5, line_search_fn="strong_wolfe")
    sparsifier.attach(optimizer)
    x = torch.randn(64, 12)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(12):
        seen.append(optimizer.step(closure).item())
        assert nonzero_inactive(sparsifier, optimizer) == 0
    assert sparsifier.step == 12
    assert seen[-1] < seen[0]


def test_a_learning_rate_scheduler_may_be_built_before_or_after():
    for before in (True, False):
        model = three_layers()
        sparsifier = Sparsifier(model, granet_method())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if before:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        sparsifier.attach(optimizer)
        if not before:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        for _ in range(10):
            train_steps(model, optimizer, 1)
            scheduler.step()
        assert sparsifier.step == 10
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_warm_up_from_zero_does_not_hide_that_an_optimizer_mixes():
    model = three_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    sparsifier.attach(optimizer)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 5))  # zero at first
    for step in range(10):
        train_steps(model, optimizer, 1, seed=step)
        warm_up.step()
        assert nonzero_inactive(sparsifier, optimizer) == 0
