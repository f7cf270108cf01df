"""Small networks and loops that train them, which the tests of the sparsifier share."""

import torch
from torch import nn

from granet import GraNet


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))


def granet_method(**more):
    return GraNet(**{"sparsity": 0.9, "initial_sparsity": 0.5, "end": 12, "total": 30, "interval": 3, **more})


def train_steps(model, optimizer, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, 12, generator=rng)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def nonzero_inactive(sparsifier, *optimizers):
    """How many inactive weights or buffer entries are not zero."""
    total = 0
    for name, p in sparsifier._parameters.items():
        states = [optimizer.state[p] for optimizer in optimizers if p in optimizer.state]
        buffers = [v for s in states for v in s.values() if torch.is_tensor(v) and v.shape == p.shape]
        total += sum(int((tensor.detach()[~sparsifier.masks[name]] != 0).sum()) for tensor in [p, *buffers])
    return total
