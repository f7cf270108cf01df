"""The sparsifier: topology updates, seeds, reports, copies, and errors that explain what to do."""

import copy
import pickle
import warnings

import pytest
import torch
from small_training import granet_method, nonzero_inactive, three_layers, train_steps
from torch import nn

import granet
from granet import RigL, Sparsifier, Static


def test_an_update_on_nan_is_put_off_and_made_up_for():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method(end=6, total=30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 5)
    before = dict(sparsifier.masks)
    model(torch.randn(16, 12)).square().mean().backward()
    model[2].weight.grad.view(-1)[(~sparsifier.masks["2.weight"]).view(-1).nonzero()[0]] = float("nan")
    with pytest.warns(RuntimeWarning, match="topology update at step 6 skipped.*NaN or infinite"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(before[n], sparsifier.masks[n]) for n in before)
    assert sparsifier.step == 6 and sparsifier.update_due
    state = copy.deepcopy(sparsifier.state_dict())
    train_steps(model, optimizer, 1)
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)
    assert not sparsifier.update_due
    sparsifier.load_state_dict(state)
    assert sparsifier.update_due  # a resumed run makes up for it as well


def test_the_seed_decides_the_topology_and_the_global_generator_does_not():
    def masks(seed, noise):
        torch.manual_seed(noise)
        return Sparsifier(three_layers(), Static(sparsity=0.8), seed=seed).masks

    first, again, other = masks(1, 10), masks(1, 20), masks(2, 10)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    state = torch.get_rng_state()
    Sparsifier(mlp_without_seeding(), Static(sparsity=0.8))
    assert torch.equal(state, torch.get_rng_state())


def mlp_without_seeding():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 4))
    return model.to_empty(device="cpu")


def test_the_report_tells_masks_from_values():
    model = three_layers()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 5)
    report = sparsifier.report()
    assert sum(layer.active for layer in report.layers) == sparsifier.active
    assert sum(layer.nonzero for layer in report.layers) < sparsifier.active  # what was just grown is still zero
    text = str(report)
    assert "RigL(sparsity=0.8" in text and "total" in text and f"{sparsifier.active:,}" in text
    assert sparsifier.last_update.step == 5
    assert sparsifier.last_update.grown == sparsifier.last_update.dropped
    assert 0.2 < sparsifier.exploration <= 1


def test_mistakes_are_explained():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    with pytest.raises(RuntimeError, match="attach"):
        sparsifier.before_step()
    with pytest.raises(RuntimeError, match="attach"):
        sparsifier.clip_grad_norm_(1.0)
    with pytest.raises(ValueError, match=r"does not hold '0.weight' and 2 more"):
        sparsifier.attach(torch.optim.SGD(three_layers().parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        sparsifier.attach(optimizer)
    state = sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"the state is of GraNet\(.*this sparsifier runs Static"):
        Sparsifier(three_layers(), Static(sparsity=0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        Sparsifier(nn.Sequential(nn.Linear(12, 40)), granet_method()).load_state_dict(state)
    with pytest.raises(ValueError, match="has no masks"):
        sparsifier.load_state_dict({k: v for k, v in state.items() if k != "masks"})


def test_no_gradient_at_an_update_changes_nothing():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_steps(model, optimizer, 2)
    model(torch.randn(4, 12)).sum().backward()
    for p in model.parameters():
        p.grad = None
    with pytest.warns(RuntimeWarning, match="no sparse parameter has a gradient"):
        optimizer.step()
    assert sparsifier.version == 0


@pytest.mark.parametrize(
    "method",
    [
        granet_method(),
        granet.RigL(sparsity=0.8, end=30, interval=3),
        granet.SNFS(sparsity=0.8, total=40, interval=3),
        granet.MEST(sparsity=0.8, halve=10, end=30, interval=3, soft_bound=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_layer_without_gradient_is_trained_round(method):
    """A frozen layer, or one in no path from the loss, does not hold up the others."""
    model = three_layers()
    model[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, method, only="linear")  # else what is frozen would stay dense
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    mask, other = sparsifier.masks["0.weight"].clone(), sparsifier.masks["2.weight"].clone()
    for step in range(30):
        weight = model[2].weight.detach().clone()
        train_steps(model, optimizer, 1, seed=step)
        moved = not torch.equal(weight, model[2].weight)
        assert moved or (method.replaces_step and method.is_update(sparsifier.step))
    assert sparsifier.version >= 5 and not torch.equal(other, sparsifier.masks["2.weight"])
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 1 - method.sparsity)
    if isinstance(method, granet.RigL | granet.SNFS):
        assert torch.equal(mask, sparsifier.masks["0.weight"])


def test_a_copy_of_all_three_trains_as_the_original_does():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 2)
    other_model, other_optimizer, other = copy.deepcopy((model, optimizer, sparsifier))
    for step in range(10):
        train_steps(model, optimizer, 1, seed=step)
    assert other.step == 2
    for step in range(10):
        train_steps(other_model, other_optimizer, 1, seed=step)
    assert other.step == sparsifier.step == 12
    assert all(torch.equal(other.masks[name], mask) for name, mask in sparsifier.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        pickle.dumps(sparsifier)


def test_detached_it_lets_go():
    model = three_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    sparsifier.detach()
    train_steps(model, optimizer, 1)
    assert sparsifier.step == 0
    assert nonzero_inactive(sparsifier, optimizer) > 0
    sparsifier.attach(optimizer)  # and takes hold again
    with pytest.warns(RuntimeWarning, match="weights that the masks call inactive were not zero before the first step"):
        train_steps(model, optimizer, 1)
    assert nonzero_inactive(sparsifier, optimizer) == 0


def test_deep_r_leaves_what_is_frozen_where_it_is():
    model = three_layers()
    sparsifier = Sparsifier(model, granet.DeepR(sparsity=0.8, l1=0.01, temperature=1e-3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 2)
    model[2].weight.requires_grad_(False)
    mask, weight = sparsifier.masks["2.weight"].clone(), model[2].weight.clone()
    train_steps(model, optimizer, 1)
    both = mask & sparsifier.masks["2.weight"]
    assert torch.equal(model[2].weight[both], weight[both])
