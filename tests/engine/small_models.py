"""Small models for the tests of compiled inference, and what is asked of all of them."""

import copy
import threading

import torch
from torch import nn

from granet.engine.capture import recording


def sparse(model, density=0.3):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand_like(p) < density)
    return model.eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def mlp():
    return sparse(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))


def problem(seed=0):
    """A small network without normalisation, whose course does not hang on the last bit, and its data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip
    return model, torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))


def wide(density=0.02):
    """A model whose zeros pay on any machine."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(192, 192, 3, padding=1, bias=False), nn.BatchNorm2d(192), nn.ReLU()] * 2
    model = nn.Sequential(*(copy.deepcopy(layer) for layer in layers)).eval()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) < density)
    return model


def counting(fast):
    """How often a compiled model's kernels run: the parts that a call ran, and which of them are packed."""

    def packed(*inputs):
        with recording() as parts, torch.no_grad():
            fast(*inputs)
        return [part._packed is not None for part in parts]

    return packed


def change_in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(2)


def in_threads(work, number):
    """Calls `work(0)`, `work(1)`, ... at the same time, each in a thread of its own, and waits for all."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
