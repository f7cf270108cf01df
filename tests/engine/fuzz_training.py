"""Accelerated layers against twins that are dense, with random calls; first and second derivatives.

`python tests/engine/fuzz_training.py CALLS SEED` fails on the first wrong number.
"""

import copy
import random
import sys

import torch
from torch import nn

import granet

TOLERANCE = 1e-4  # of the largest value
ROUNDED = 4e-2  # the same under bfloat16 autocast

LAYERS = [  # the layer and a shape of its input
    (lambda: nn.Linear(24, 12), (5, 24)),
    (lambda: nn.Linear(24, 12, bias=False), (24,)),
    (lambda: nn.Linear(24, 12), (2, 3, 24)),
    (lambda: nn.Linear(24, 12), (0, 24)),
    (lambda: nn.Conv1d(6, 8, 3, padding=1), (3, 6, 10)),
    (lambda: nn.Conv1d(6, 8, 3), (6, 10)),  # without a batch
    (lambda: nn.Conv2d(6, 8, 3, padding=1), (3, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False), (2, 6, 9, 8)),
    (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 7)),
    (lambda: nn.Conv2d(6, 8, 1), (17, 6, 4, 4)),
    (lambda: nn.Conv2d(6, 8, 1), (6, 4, 4)),  # without a batch
]


def in_some_layout(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same numbers, contiguous or not."""
    kind = rng.choice(["contiguous", "contiguous", "slice", "transposed", "channels last"])
    if kind == "slice":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "channels last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    return x.clone()


def same(found, expected, what: str, where=None) -> None:
    """Raises AssertionError unless both are the same within rounding, at the positions `where`.

    Under autocast the rounding is that of bfloat16.
    """
    assert (found is None) == (expected is None), what
    if expected is None or not expected.numel():
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    if where is not None:
        found, expected = found[where], expected[where]
    found, expected = found.float(), expected.float()
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    tolerance = ROUNDED if torch.is_autocast_enabled("cpu") else TOLERANCE
    assert error <= tolerance * (scale + 1e-2), f"{what}: off by {error:.2e} at a scale of {scale:.2e}"


def derivatives(layer: nn.Module, x: torch.Tensor, *, keyword: bool, frozen: bool, twice: bool) -> dict:
    """The output and its first derivatives, or the second ones of a penalty on the first."""
    tensors = {"input": x, **dict(layer.named_parameters())}
    if frozen:
        tensors.pop("weight")
    layer.weight.requires_grad_(not frozen)
    for t in tensors.values():
        t.requires_grad_()
    y = layer(input=x) if keyword else layer(x)
    wanted = list(tensors.values())
    first = torch.autograd.grad(torch.tanh(y).square().sum(), wanted, create_graph=twice)
    if not twice:
        return {"output": y.detach(), **dict(zip(tensors, first, strict=True))}
    penalty = sum(g.square().sum() + g.tanh().sum() for g in first)
    return {"second " + n: g for n, g in zip(tensors, torch.autograd.grad(penalty, wanted), strict=True)}


def check_random_calls(count: int, seed: int) -> None:
    """`count` random calls of random layers, plain and accelerated, with the same derivatives."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        make, shape = rng.choice(LAYERS)
        fast = make()
        sparsifier = granet.Sparsifier(fast, granet.Static(sparsity=0.6))
        dense = copy.deepcopy(fast)
        example = torch.randn(4, *shape[1:]) if shape[0] == 0 else torch.randn(shape)
        x = in_some_layout(torch.randn(shape), rng)
        options = {"keyword": rng.random() < 0.5, "frozen": rng.random() < 0.2, "twice": rng.random() < 0.6}
        autocast = rng.random() < 0.4
        what = f"{fast} on {shape}, strides {x.stride()}, {options}, autocast {autocast}"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            plan = granet.accelerate(sparsifier, example)
            found = derivatives(fast, x.detach(), **options)
            expected = derivatives(dense, x, **options)
            batched = type(fast) is nn.Linear or len(shape) == (3 if type(fast) is nn.Conv1d else 4)
            assert (plan.report().layers[0].chosen == "sparse") == batched, what
            for name, value in expected.items():
                where = sparsifier.masks["weight"] if name.endswith("weight") else None
                same(found[name], value, f"{name} of {what}", where)


if __name__ == "__main__":
    from granet.engine import layer, timing

    timing.NOISE = -1e9
    layer.HOPELESS = 1.0
    check_random_calls(int(sys.argv[1]), int(sys.argv[2]))
