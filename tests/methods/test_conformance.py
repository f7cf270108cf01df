"""200 steps of training beside a naive statement of the official procedure: equal to the bit.

The official code of GraNet trains all weights, sets inactive ones and their momentum to zero after every step, and
every `interval` steps finds thresholds by full sorts. Here the same is written out plainly, with what granet does on
purpose: how numbers are rounded, that the last pruning reaches the target, that growth is among inactive weights alone,
and that a weight which is pruned and grown in one update keeps its value. `docs/conformance.md` lists all differences.
"""

from fractions import Fraction
from math import cos, floor, pi

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import granet

STEPS, INTERVAL, R = 200, 10, 0.5


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


def batch(step):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=rng), torch.randint(0, 10, (8,), generator=rng)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def number(share, of):
    """A share of a number of weights, rounded down, the share as the decimal number that it prints as."""
    return floor(Fraction(repr(round(share, 12))) * of)


class Official:
    """The procedure: a loop, masks of ones and zeros, and sorts."""

    def __init__(self, masks, *, prune, exchange):
        self.model = network()
        self.optimizer = sgd(self.model)
        self.masks = {name: mask.float() for name, mask in masks.items()}
        self.weights = {name: dict(self.model.named_parameters())[name] for name in masks}
        self.prune, self.exchange = prune, exchange
        self.apply()

    @torch.no_grad()
    def apply(self):
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])
            if "momentum_buffer" in self.optimizer.state[weight]:
                self.optimizer.state[weight]["momentum_buffer"].mul_(self.masks[name])

    @torch.no_grad()
    def step(self, t):
        x, y = batch(t)
        with torch.enable_grad():
            F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.apply()
        if self.prune is not None and self.prune(t) is not None:
            self.prune_globally(self.prune(t))
        if self.exchange and t % INTERVAL == 0 and t < STEPS:
            ratio = 0.005 + (R - 0.005) * (1 + cos(pi * t / STEPS)) / 2
            for name in self.weights:
                self.regenerate(name, ratio)
        self.apply()
        self.optimizer.zero_grad()

    def prune_globally(self, n):
        sizes = [w.abs().masked_fill(self.masks[name] == 0, -1).flatten() for name, w in self.weights.items()]
        kept = torch.zeros(sum(map(len, sizes)))
        kept[torch.cat(sizes).argsort(descending=True, stable=True)[:n]] = 1
        for name, part in zip(self.masks, kept.split([len(one) for one in sizes]), strict=True):
            self.masks[name] = part.view_as(self.masks[name]).clone()

    def regenerate(self, name, ratio):
        weight, mask = self.weights[name], self.masks[name]
        n = number(ratio, int(mask.sum()))
        if int(mask.sum()) == mask.numel():
            return
        sizes = weight.abs().masked_fill(mask == 0, float("inf")).flatten()
        smallest = sizes.flip(0).argsort(stable=True)[:n]  # of equal ones the last
        mask.view(-1)[len(sizes) - 1 - smallest] = 0
        steep = weight.grad.abs().masked_fill(mask == 1, -1).flatten()
        mask.view(-1)[steep.argsort(descending=True, stable=True)[:n]] = 1


def cubic(initial, final, end):
    def active(t):
        if t > end or (t % INTERVAL and t != end):
            return None
        sparsity = final + (initial - final) * (1 - t / end) ** 3
        return floor(Fraction(repr(round(1 - sparsity, 12))) * total + Fraction(1, 2))

    total = sum(p.numel() for p in network().parameters() if p.ndim > 1)
    return active


CASES = {
    "GraNet, sparse to sparse": (
        granet.GraNet(sparsity=0.9, initial_sparsity=0.5, end=100, total=STEPS, interval=INTERVAL, regeneration=R),
        {"prune": cubic(0.5, 0.9, 100), "exchange": True},
    ),
    "GraNet, dense to sparse": (
        granet.GraNet(sparsity=0.95, initial_sparsity=0.0, end=120, total=STEPS, interval=INTERVAL, regeneration=R),
        {"prune": cubic(0.0, 0.95, 120), "exchange": True},
    ),
    "GMP": (
        granet.GMP(sparsity=0.9, end=100, interval=INTERVAL),
        {"prune": cubic(0.0, 0.9, 100), "exchange": False},
    ),
    "RigL-ITOP": (
        granet.RigLITOP(sparsity=0.8, total=STEPS, interval=INTERVAL, drop_fraction=R),
        {"prune": None, "exchange": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_200_steps_are_those_of_the_official_procedure_to_the_bit(name):
    method, official = CASES[name]
    model = network()
    sparsifier = granet.Sparsifier(model, method)
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    other = Official(sparsifier.masks, **official)
    parameters, updates = dict(model.named_parameters()), 0
    for t in range(1, STEPS + 1):
        x, y = batch(t)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step(t)
        updates += sparsifier.last_update is not None and sparsifier.last_update.step == t
        for key, weight in other.model.named_parameters():
            assert torch.equal(parameters[key], weight), (t, key)
            theirs = other.optimizer.state[weight]["momentum_buffer"]
            assert torch.equal(optimizer.state[parameters[key]]["momentum_buffer"], theirs), (t, key)
        for key, mask in other.masks.items():
            assert torch.equal(sparsifier.masks[key], mask.bool()), (t, key)
    assert updates >= 10 and sparsifier.sparsity > 0.79
