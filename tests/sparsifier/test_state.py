"""Masks to start from, and states that are loaded."""

import pytest
import torch
from small_training import three_layers, train_steps

import granet
from granet import GMP, Dense, Sparsifier, Static
from granet.sparsifier.state import checked_masks


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))


def masks():
    torch.manual_seed(1)
    return {"0.weight": torch.rand(5, 6) < 0.5, "2.weight": torch.rand(2, 5) < 0.5}


def test_a_sparsifier_starts_from_given_masks_and_keeps_them():
    given, net = masks(), model()
    sparsifier = Sparsifier(net, Dense(), masks=given)
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in given.items())
    optimizer = torch.optim.Adam(net.parameters())
    sparsifier.attach(optimizer)
    for _ in range(3):
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not net[0].weight[~given["0.weight"]].any()
    given["0.weight"].fill_(True)  # the caller's tensors are its own
    assert not sparsifier.masks["0.weight"].all()


def test_pruning_goes_on_from_given_masks():
    sparsifier = Sparsifier(model(), GMP(sparsity=0.9, end=10, interval=5), masks=masks())
    assert sparsifier.active == sum(int(mask.sum()) for mask in masks().values())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: m.pop("0.weight"), "'0.weight' is missing"),
        (lambda m: m.update(extra=m["0.weight"]), "'extra' is no sparse parameter"),
        (lambda m: m.update({"2.weight": m["2.weight"].float()}), "torch.float32"),
        (lambda m: m.update({"2.weight": m["2.weight"].T}), r"torch.bool of shape \(2, 5\) is needed"),
        (lambda m: m["2.weight"].fill_(False), "'2.weight' has no active weight"),
    ],
)
def test_masks_of_another_model_are_refused(spoil, says):
    given = masks()
    spoil(given)
    with pytest.raises(ValueError, match=says):
        Sparsifier(model(), Dense(), masks=given)
    with pytest.raises(ValueError, match=says):
        checked_masks(given, {name: p for name, p in model().named_parameters() if p.ndim > 1})


def test_a_state_without_some_of_its_parts_is_refused():
    sparsifier = Sparsifier(model(), Static(sparsity=0.5))
    damaged = sparsifier.state_dict()
    del damaged["ever"], damaged["memory"]
    with pytest.raises(ValueError, match="it has no ever, memory"):
        sparsifier.load_state_dict(damaged)


def test_masks_that_a_method_cannot_start_from():
    masks = Sparsifier(three_layers(), Static(sparsity=0.8)).masks
    with pytest.raises(ValueError, match="STR finds its masks by training: it cannot start from masks="):
        Sparsifier(three_layers(), granet.STR(), masks=masks)
    full = {name: torch.ones_like(mask) if name == "2.weight" else mask for name, mask in masks.items()}
    method = granet.MEST(sparsity=0.8, halve=5, end=10, interval=3, soft_bound=True)
    model = three_layers()
    sparsifier = Sparsifier(model, method, masks=full)  # more in one layer than its budget
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 12)
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.2)
