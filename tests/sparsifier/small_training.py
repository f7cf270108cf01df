"""Small networks and loops that train them, which the tests of the sparsifier share."""

import torch
from torch import nn
from torch.nn import functional as F

from granet import GraNet
from granet.sparsifier.attachment import family

X, Y = torch.randn(64, 20, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def granet_method(**more):
    return GraNet(**{"sparsity": 0.9, "initial_sparsity": 0.5, "end": 12, "total": 30, "interval": 3, **more})


def train_steps(model, optimizer, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, 12, generator=rng)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def nonzero_inactive(sparsifier, *optimizers):
    """Returns how many inactive weights, or entries of buffers in the optimizers' own state, are not zero."""
    total = 0
    for name, p in sparsifier._parameters.items():
        states = [optimizer.state[p] for optimizer in optimizers if p in optimizer.state]
        buffers = [v for s in states for v in s.values() if torch.is_tensor(v) and v.shape == p.shape]
        total += sum(int((tensor.detach()[~sparsifier.masks[name]] != 0).sum()) for tensor in [p, *buffers])
    return total


def nonzero_inactive_nested(sparsifier, *optimizers):
    """Returns the same for the optimizers and all those inside of them."""
    total = 0
    members = [member for optimizer in optimizers for member in family(optimizer)]
    for name, mask in sparsifier.masks.items():
        p = sparsifier.model.get_parameter(name)
        buffers = [v for o in members if p in o.state for v in o.state[p].values() if torch.is_tensor(v)]
        total += sum(int((t.detach()[~mask] != 0).sum()) for t in (p, *buffers) if t.shape == p.shape)
    return total


def class_loss(model):
    return F.cross_entropy(model(X), Y)
