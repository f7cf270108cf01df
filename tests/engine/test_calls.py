"""Calls of a compiled model: whatever arguments share or keep, the numbers are the model's and no trace is left."""

import numpy
import pytest
import torch
from small_models import close, mlp, sparse
from torch import nn

import granet


class ChangesTheFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 32)

    def forward(self, x, y):
        x.add_(1)
        return self.layer(y) + self.layer(x)


@pytest.mark.parametrize(
    ("rows", "views"),
    [
        (4, lambda t: (t, t)),
        (4, lambda t: (t, t[:])),
        (6, lambda t: (t[:4], t[2:6])),
        (6, lambda t: (t[2:6], t[:4])),
        (8, lambda t: (t[:4], t[4:])),
        (4, lambda t: (t, t.new_ones(4, 16))),
    ],
)
def test_inputs_that_overlap_one_of_which_is_changed(rows, views, always):
    model = sparse(ChangesTheFirst())
    fast = granet.compile(model, (torch.randn(4, 16), torch.randn(4, 16)))
    assert fast.report().chosen == "sparse"
    one, other = (views(torch.arange(rows * 16.0).reshape(rows, 16) / 100) for _ in range(2))
    with torch.no_grad():
        close(fast(*one), model(*other))
    close(one, other)


def test_another_model_in_the_place_of_the_compiled_one(always):
    x = torch.randn(4, 16)
    fast = granet.compile(mlp(), x)
    fast.model = nn.Sequential(nn.Linear(16, 3), nn.Tanh()).eval()
    for _ in range(2):
        close(fast(x), fast.model(x).detach())
    assert [row.name for row in fast.report().layers] == ["0"]


class Normalises(nn.Module):
    """Makes constants in its forward, and writes one into its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 32)

    def forward(self, x):
        x = (x - torch.tensor([0.5])) / torch.tensor([0.25])
        x[0] = 1
        return self.layer(x).relu()


def test_constants_that_the_model_makes(always):
    model, x = sparse(Normalises()), torch.rand(4, 16)
    fast = granet.compile(model, x)
    assert fast.report().chosen == "sparse", fast.report().why
    for inputs in (x, torch.rand(4, 16)):
        close(fast(inputs), model(inputs).detach())


class Cache:
    def __init__(self):
        self.seen, self.count, self.total = [], 0, torch.zeros(32)

    def add(self, h):
        self.seen.append(h)
        self.count += 1
        self.total = self.total + h.sum(0)
        return self.total


class KeepsACache(nn.Module):
    """Keeps state in an object of its own, which is no tensor, list or dict, or in one that it is given."""

    def __init__(self):
        super().__init__()
        self.layer, self.cache = nn.Linear(16, 32), Cache()

    def forward(self, x, cache=None):
        return (cache or self.cache).add(self.layer(x))


def test_objects_that_the_model_keeps_are_left_as_they_were(always):
    model, x = sparse(KeepsACache()), torch.randn(4, 16)
    fast = granet.compile(model, x)
    cache = model.cache
    assert (cache.seen, cache.count, cache.total.any().item()) == ([], 0, False)
    for rows in (4, 4, 5):  # five rows are measured in that very call
        x = torch.randn(rows, 16)
        before = cache.total
        with torch.no_grad():
            close(fast(x), before + model.layer(x).sum(0))
    assert (len(cache.seen), cache.count) == (3, 3)


def test_objects_that_are_arguments_change_as_in_one_call(always):
    model, example = sparse(KeepsACache()), Cache()
    fast = granet.compile(model, (torch.randn(4, 16), example))
    assert (example.seen, example.count) == ([], 0)
    for rows in (4, 5):
        mine, x = Cache(), torch.randn(rows, 16)
        with torch.no_grad():
            close(fast(x, mine), model.layer(x).sum(0))
        assert (len(mine.seen), mine.count) == (1, 1)


@pytest.mark.parametrize("setting", ["device", "dtype"])
def test_what_torch_makes_tensors_as_by_default_does_not_matter(setting, always):
    model, x = mlp(), torch.randn(4, 16)
    expected = model(x).detach()
    if setting == "device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    try:
        fast = granet.compile(model, x)
        assert fast.report().chosen == "sparse", fast.report().why
        close(fast(x), expected)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


X = torch.zeros(4, 16)


def sparsifier():
    return granet.Sparsifier(mlp(), granet.SET(sparsity=0.5, total=10))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: granet.compile(None, X), "the model is None, and a torch.nn.Module is needed"),
        (lambda: granet.compile(mlp, X), "the model is a function"),
        (lambda: granet.compile(mlp(), numpy.zeros((4, 16))), "example_inputs is a ndarray: a tensor is needed"),
        (lambda: granet.compile(mlp(), 4), "example_inputs is 4"),
        (lambda: granet.compile(mlp(), X, tolerance="1"), "tolerance is the text '1', and a number is needed"),
        (lambda: granet.compile(mlp(), X, shapes=2.0), "shapes is 2.0, and a whole number is needed"),
        (lambda: granet.accelerate(mlp(), X), "was given a Sequential: the sparsifier of the model comes first"),
        (lambda: granet.accelerate(sparsifier(), None), "example_inputs is None: a tensor is needed"),
        (lambda: granet.accelerate(sparsifier(), X, model=mlp), "was given a function: model= takes a torch.nn.Module"),
    ],
)
def test_things_of_the_wrong_kind(call, says):
    with pytest.raises(TypeError, match=says):
        call()
