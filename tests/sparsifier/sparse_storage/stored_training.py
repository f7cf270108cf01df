"""A small network in training, in dense and in sparse storage, which the tests of sparse storage share."""

import torch
from torch import nn
from torch.nn import functional as F

import granet
from granet import Sparsifier

METHODS = {
    "static": granet.Static(sparsity=0.8),
    "set": granet.SET(sparsity=0.8, total=24, interval=4),
    "rigl": granet.RigL(sparsity=0.8, end=24, interval=4),
    "rigl explore": granet.RigL(sparsity=0.8, end=24, interval=4, growth="explore", explored=0.5),
    "granet explore": granet.GraNet(
        sparsity=0.9, initial_sparsity=0.5, end=16, total=24, interval=4, growth="explore", explored=0.3
    ),
    "rigl-itop": granet.RigLITOP(sparsity=0.8, total=24, interval=4),
    "mest": granet.MEST(sparsity=0.8, halve=9, end=18, interval=4),
    "granet": granet.GraNet(sparsity=0.9, initial_sparsity=0.5, end=16, total=24, interval=4),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}
STEPS = 24


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.Flatten(2), nn.Conv1d(8, 6, 1), nn.Flatten(), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip


def batch(step):
    rng = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 1, 8, 8, generator=rng), torch.randint(0, 5, (16,), generator=rng)


class Training:
    def __init__(self, storage, method, optimizer="sgd", seed=0, *, doubles=False, **options):
        self.model = network()
        if doubles:  # several ranks add up in another order; batch norm would see other batches
            self.model = self.model.double()
            self.model[1] = nn.Identity()
        self.sparsifier = Sparsifier(self.model, METHODS.get(method, method), storage=storage, seed=seed, **options)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier.attach(self.optimizer)

    def loss(self, part=slice(None)):
        x, y = batch(self.sparsifier.step)
        return F.cross_entropy(self.model(x[part]), y[part])

    def step(self, times=1):
        for _ in range(times):
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def pair(method, optimizer="sgd", **options):
    return [Training(storage, method, optimizer, **options) for storage in ("dense", "sparse")]
