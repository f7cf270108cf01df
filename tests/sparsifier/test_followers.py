"""Averages of the weights, in the forms and under the names that libraries give them."""

import copy

import pytest
import torch
from small_training import granet_method, three_layers, train_steps
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import granet
from granet import RigL, Sparsifier, Static
from granet.sparsifier.masking import leaks


class Named(nn.Module):
    """A model with a child called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Linear(20, 40), nn.Linear(40, 5)

    def forward(self, x):
        return self.head(self.module(x).relu())


class Shadow:
    """As torch_ema and diffusers keep an average: a list in the order of the parameters."""

    def __init__(self, parameters):
        self.shadow_params = [p.detach().clone() for p in parameters]

    def update(self, parameters):
        self.shadow_params = [s.lerp(p.detach(), 0.1) for s, p in zip(self.shadow_params, parameters, strict=True)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def compiled_of(model):
    return torch.compile(model, backend="eager")


def train(model, optimizer, after=lambda: None, steps=12):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        after()


def test_a_shadow_list_stays_sparse():
    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.9, end=100, interval=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    shadow, plain = Shadow(model.parameters()), {name: p.detach().clone() for name, p in model.named_parameters()}
    listed = [p.detach().clone() for p in model.parameters()]
    for follower in (shadow, plain, listed):
        sparsifier.follow(follower)

    def check():
        weights = dict(model.named_parameters())
        for i, (name, p) in enumerate(weights.items()):
            plain[name].lerp_(p.detach(), 0.1)
            listed[i].lerp_(p.detach(), 0.1)
        shadow.update(model.parameters())
        for name, mask in sparsifier.masks.items():
            i = list(weights).index(name)
            for tensor in (plain[name], listed[i], shadow.shadow_params[i]):
                assert not tensor[~mask].any() and tensor.any()

    train(model, optimizer, check)
    assert sparsifier.version == 4


@pytest.mark.parametrize("model", [mlp, Named])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("average", [copy.deepcopy, AveragedModel, lambda m: AveragedModel(compiled_of(m))])
@pytest.mark.parametrize("method", [RigL(sparsity=0.9, end=100, interval=3), granet.TopKAST(sparsity=0.8)])
def test_wrappers_on_either_side_are_seen_through(model, compiled, average, method):
    model = model()
    sparsifier = Sparsifier(torch.compile(model, backend="eager") if compiled else model, method)
    follower = average(model)
    sparsifier.follow(follower)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    train(model, optimizer, steps=6)
    if isinstance(method, RigL):
        zeros = sum(int((p == 0).sum()) for p in follower.parameters() if p.ndim > 1)
        assert zeros >= sparsifier.total - sparsifier.active


def test_the_state_of_a_compiled_model_goes_into_a_plain_one_and_back():
    method = RigL(sparsity=0.9, end=100, interval=3)
    plain, other = Sparsifier(mlp(), method, seed=1), Sparsifier(torch.compile(mlp(), backend="eager"), method, seed=2)
    wanted = {name: mask.clone() for name, mask in plain.masks.items()}
    other.load_state_dict(plain.state_dict())
    assert all(torch.equal(other.masks[f"_orig_mod.{name}"], mask) for name, mask in wanted.items())
    third = Sparsifier(mlp(), method, seed=3)
    third.load_state_dict(other.state_dict())
    assert all(torch.equal(third.masks[name], mask) for name, mask in wanted.items())
    given = Sparsifier(mlp(), method, masks=other.masks)
    assert all(torch.equal(given.masks[name], mask) for name, mask in wanted.items())


def test_what_is_no_copy_is_refused():
    sparsifier = Sparsifier(mlp(), Static(sparsity=0.9))
    with pytest.raises(ValueError, match=r"has no parameter '0.weight': it is no copy"):
        sparsifier.follow(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 4\) in dict, and \(40, 20\) in the model"):
        sparsifier.follow({"0.weight": torch.ones(4, 4), "2.weight": torch.ones(5, 40)})
    with pytest.raises(ValueError, match="the list has 1 tensors that do not fit the 4 parameters"):
        sparsifier.follow([torch.ones(40, 20)])
    with pytest.raises(TypeError, match=r"takes a module, a dict.*int is none"):
        sparsifier.follow(3)


def test_an_average_of_the_weights_stays_sparse():
    model = three_layers()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)), copy.deepcopy(model)]
    for average in averages:
        sparsifier.follow(average)
    for step in range(30):
        train_steps(model, optimizer, 1, seed=step)
        averages[0].update_parameters(model)
        for mine, theirs in zip(averages[1].parameters(), model.parameters(), strict=True):
            mine.detach().lerp_(theirs.detach(), 0.01)
        for average in averages:
            named = {name.removeprefix("module."): p for name, p in average.named_parameters()}
            assert not leaks((mask, [named[name]]) for name, mask in sparsifier.masks.items())
    assert sparsifier.version > 3
    with pytest.raises(ValueError, match="no copy of the model"):
        sparsifier.follow(nn.Linear(2, 2))
