"""One sparsifier keeps a weight sparse, and no optimizer moves it unseen."""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from granet import Sparsifier, Static


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 20)), torch.arange(16) % 5).backward()
    optimizer.step()


def test_an_optimizer_that_was_not_attached_is_named_at_its_first_step():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.warns(
        RuntimeWarning, match=r"Adam moved inactive weights.*not attached.*sparsifier.attach\(optimizer\)"
    ):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)  # said once
    assert sparsifier.step == 0


def test_a_second_optimizer_that_nobody_attached_is_named():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    first, second = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters())
    sparsifier.attach(first)
    step(model, first)
    with pytest.warns(RuntimeWarning, match="Adam moved inactive weights"):
        step(model, second)


@pytest.mark.parametrize("ask", [lambda s: s.sparsity, lambda s: s.report(), lambda s: s.state_dict()])
def test_a_model_that_became_dense_by_hand_is_noticed_when_it_is_asked(ask):
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    ask(sparsifier)
    with torch.no_grad():  # no optimizer of torch's at all
        for p in model.parameters():
            p.sub_(0.1)
    with pytest.warns(RuntimeWarning, match="An optimizer moved inactive weights.*not attached"):
        ask(sparsifier)


def test_optimizers_of_other_parameters_are_none_of_its_business():
    model = mlp()
    Sparsifier(model, Static(sparsity=0.9))
    step(mlp(), torch.optim.SGD(mlp().parameters(), 0.1))
    kept = Sparsifier(model, Static(sparsity=0.9))
    step(model, torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], 0.1))
    kept.detach()
    step(model, torch.optim.SGD(model.parameters(), 0.1))  # let go, it says nothing


def test_a_second_sparsifier_on_the_same_weights_is_refused():
    model = mlp()
    first = Sparsifier(model, Static(sparsity=0.9))
    second = Sparsifier(model, Static(sparsity=0.9), seed=1)  # as long as none is attached, the latest one counts
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first.attach(optimizer)
    weights = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"another sparsifier.*call its detach\(\) first"):
        second.attach(optimizer)
    with pytest.raises(ValueError, match=r"another sparsifier.*call its detach\(\) first"):
        Sparsifier(model, Static(sparsity=0.5))
    assert torch.equal(weights, model[0].weight)  # and nothing was changed
    first.detach()
    Sparsifier(model, Static(sparsity=0.9), seed=1).attach(optimizer)


def test_a_sparsifier_that_is_gone_is_in_nobodys_way():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Sparsifier(model, Static(sparsity=0.9)).attach(optimizer)
    del optimizer
    gc.collect()
    Sparsifier(model, Static(sparsity=0.9)).attach(torch.optim.SGD(model.parameters(), 0.1))
