"""Golden values: what each method did when it was right, so that a change of behaviour is seen.

A new method has no entry yet: `python tests/test_golden.py NAME` adds it, with the settings of `method_settings.py`
unless SETTINGS here has others. To accept a change on purpose, the same command writes an entry anew (without names,
all of them); say why in the commit.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import method_settings
from granet import METHODS, Probe, Sparsifier
from granet.criterion import Layer

FILE = Path(__file__).parent / "golden" / "methods.json"
STEPS = 50
SETTINGS = {
    "dense": {},
    "static": {"sparsity": 0.7},
    "gmp": {"sparsity": 0.7, "end": 40, "interval": 5},
    "granet": {"sparsity": 0.7, "end": 40, "total": STEPS, "interval": 5},
    "rigl": {"sparsity": 0.7, "end": 40, "interval": 5},
    "set": {"sparsity": 0.7, "total": STEPS, "interval": 5},
    "snfs": {"sparsity": 0.7, "total": STEPS, "interval": 5},
    "deep-r": {"sparsity": 0.7, "l1": 1e-3, "temperature": 1e-6},
    "dsr": {"sparsity": 0.7, "total": STEPS, "interval": 5, "threshold": 0.01},
    "mest": {"sparsity": 0.7, "halve": 25, "end": 45, "interval": 5},
    "ac-dc": {"sparsity": 0.7, "begin": 5, "interval": 5, "end": 40},
    "rigl-itop": {"sparsity": 0.7, "total": STEPS, "interval": 5},
    "snip": {"sparsity": 0.7},
    "grasp": {"sparsity": 0.7},
    "synflow": {"sparsity": 0.7, "rounds": 10},
    "str": {"s_init": -3.0, "interval": 10},
    "top-kast": {"sparsity": 0.7, "interval": 5},
    "fixed": {},
}


def make(name):
    """Returns the method with its settings here, or else with those in `method_settings.py`."""
    if name in SETTINGS:
        return METHODS[name](**SETTINGS[name])
    return method_settings.make(name)


def recorded(name):
    """The values that the file has of a method."""
    values = json.loads(FILE.read_text())
    assert name in values, f"{name} has no golden values yet: run `python tests/test_golden.py {name}`"
    return values[name]


def losses(name):
    """The loss of every tenth step of 50 on the digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 60), nn.ReLU(), nn.Linear(60, 10))
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    sparsifier = Sparsifier(model, make(name), seed=1, probe=Probe(model, [(x[:64], y[:64])]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    seen = []
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(x[step * 32 : step * 32 + 32]), y[step * 32 : step * 32 + 32])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return [round(loss, 6) for loss in seen[9::10]]


class Products(nn.Module):
    """A network whose gradient, Hessian and flow are products of whole numbers: half the sum of g * w ** 2."""

    def __init__(self, layers):
        super().__init__()
        for key, layer in layers.items():
            self.register_parameter(key, nn.Parameter(layer.weight))
            self.register_buffer(f"{key}_grad", layer.grad)

    def forward(self, x):
        return torch.cat([(self.get_buffer(f"{n}_grad") * w**2 / 2).flatten() for n, w in self.named_parameters()])


def topology(name):
    """A hash of the masks after `init` and four updates on weights and gradients that no rounding can change."""
    method = make(name)
    rng = np.random.default_rng(7)
    shapes = {"a": (30, 20), "b": (16, 8, 3, 3), "c": (10, 30)}
    whole = lambda shape: torch.from_numpy(rng.integers(-1000, 1000, shape).astype(np.float32))  # noqa: E731  (one line)
    generator = torch.Generator().manual_seed(3)
    layers = {key: Layer(whole(shape), whole(shape)) for key, shape in shapes.items()}
    probe = Probe(Products(layers), [(torch.ones(1), torch.ones(1))], lambda y, _: y.sum())
    memory = {}
    masks = method.init(layers, generator, *([probe] if method.needs_probe else []))
    digest = hashlib.sha256()
    for step in (5, 10, 20, 40):
        layers = {key: Layer(whole(shape) * masks[key], whole(shape)) for key, shape in shapes.items()}
        masks = method.update(step, layers, masks, generator, *([memory] if method.remembers else []))
        for mask in masks.values():
            digest.update(np.packbits(mask.numpy()).tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("name", METHODS)
def test_the_masks_are_those_they_were(name):
    assert topology(name) == recorded(name)["masks"]


@pytest.mark.parametrize("name", METHODS)
def test_the_losses_are_those_they_were(name):
    """Within what other processors' rounding does to fifty steps."""
    bound = 0.05 if name == "feather" else 0.02  # weights near its threshold come and go: 2.2 % has been seen
    assert losses(name) == pytest.approx(recorded(name)["losses"], rel=bound)


if __name__ == "__main__":
    values = json.loads(FILE.read_text())
    for name in sys.argv[1:] or METHODS:
        values[name] = {"masks": topology(name), "losses": losses(name)}
    FILE.write_text(json.dumps(values, indent=1))
