"""Random layers against the plain reference; run as a program where an environment variable must be set from the start.

`python tests/engine/fuzz_layers.py LAYERS SEED` prints the instruction set and fails on the first wrong number.
"""

import random
import sys

import torch

from granet.engine import ops, reference
from granet.engine.spec import Spec

TOLERANCE = 2e-5  # of the largest value, per 32 summands or so
ROUNDING = 1 / 256  # of a number, to bfloat16


def random_spec(rng: random.Random) -> tuple[Spec, tuple[int, int]]:
    """A layer with an odd shape and an input size its kernel fits."""
    while True:
        groups = rng.choice([1, 1, 1, 2, 3])
        spec = Spec(
            in_channels=groups * rng.choice([1, 3, 5, 8, 33]),
            out_channels=groups * rng.choice([1, 2, 7, 8, 17]),
            kernel=(rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 3, 4])),
            stride=(rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])),
            padding=(rng.choice([0, 1, 2, 4]), rng.choice([0, 1, 3])),
            dilation=(rng.choice([1, 1, 2]), rng.choice([1, 1, 3])),
            groups=groups,
        )
        size = (rng.choice([1, 4, 7, 9, 16]), rng.choice([1, 4, 5, 8, 13, 32]))
        try:
            spec.output_size(size)
        except ValueError:
            continue
        return spec, size


def poison() -> None:
    """Leaves freed memory full of NaN behind, for buffers that nobody fills."""
    for floats in (200, 3_000, 40_000, 500_000):
        blocks = [torch.full((floats,), float("nan")) for _ in range(4)]
        del blocks


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises AssertionError unless `found` equals `expected` within rounding, to its own type as well."""
    rounding = ROUNDING if found.dtype is torch.bfloat16 else 0.0
    found = found.float()
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if expected.numel():
        scale = expected.abs().max().item() + 1
        error = ((found - expected).abs() - rounding * expected.abs()).max().item()
        assert error <= TOLERANCE * scale, f"{what} is off by {error:.2e} at a scale of {scale:.1f}"


def check_layer(
    spec: Spec,
    shape: tuple[int, ...],
    density: float,
    batch: int | None,
    *,
    bias: bool,
    last: bool,
    bfloat16: bool = False,
    weight_last: bool = False,
) -> None:
    """Forward and all gradients of one random layer against the reference."""
    kind = torch.bfloat16 if bfloat16 else torch.float32
    weight = torch.randn(spec.weight_shape, dtype=kind).float()
    if weight_last:
        weight = weight.to(memory_format=torch.channels_last)
    weight.requires_grad_()
    mask = torch.rand(spec.weight_shape) < density
    x = torch.randn(shape, dtype=kind)
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    offset = torch.randn(spec.out_channels, requires_grad=True) if bias else None
    what = f"{spec} on {shape}, density {density}, batch {batch}, {kind}"
    poison()
    y = ops.conv(x, weight, offset, ops.layout(mask, spec, shape, batch, bfloat16=bfloat16, channels_last=weight_last))
    assert y.dtype is kind
    expected = reference.conv(
        x.detach().float(), weight.detach(), None if offset is None else offset.detach(), mask, spec
    )
    assert_close(y.detach(), expected, f"output of {what}")
    dy = torch.randn_like(expected).to(kind)
    poison()
    y.backward(dy)
    if shape[0] == 0:
        dx, dw = torch.zeros(shape), torch.zeros_like(weight)
    else:
        dx, dw = reference.conv_gradients(dy.float(), x.detach().float(), weight.detach(), mask, spec)
    assert_close(x.grad, dx, f"input gradient of {what}")
    assert_close(weight.grad, dw, f"weight gradient of {what}")
    assert not weight.grad[~mask].any(), f"gradient at inactive weights of {what}"
    if offset is not None:
        assert_close(offset.grad, dy.float().sum([d for d in range(dy.dim()) if d != 1]), f"bias gradient of {what}")


def check_random_layers(count: int, seed: int) -> None:
    """`check_layer` on `count` random convolutions and a quarter as many linear layers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for i in range(count):
        bfloat16 = i % 5 in (1, 4)
        width = ops.bfloat16_cpu()[0] if bfloat16 else ops.cpu()[0]
        spec, size = random_spec(rng)
        images = rng.choice([0, 1, 2, 3, width + 1, 2 * width])
        shape = (images, spec.in_channels, *size)
        if i % 4 == 0:
            spec = Spec(in_channels=rng.choice([1, 7, 64, 100]), out_channels=rng.choice([1, 10, 33]))
            shape = (images, spec.in_channels)
        density = rng.choice([0.0, 0.02, 0.1, 0.4, 1.0])
        batch = rng.choice([None, 2 * width if bfloat16 else 1, width])
        check_layer(
            spec,
            shape,
            density,
            batch,
            bias=rng.random() < 0.5,
            last=rng.random() < 0.3,
            bfloat16=bfloat16,
            weight_last=rng.random() < 0.3,
        )


def check_panels() -> None:
    """1x1 layers on more positions than are packed at a time: with a last panel of any length, groups, few weights."""
    torch.manual_seed(0)
    for size in ((24, 24), (33, 32), (40, 28), (32, 48), (25, 25)):
        for groups, density in ((1, 0.1), (2, 0.4), (1, 0.0)):
            spec = Spec(in_channels=10, out_channels=14, groups=groups)
            check_layer(spec, (3, 10, *size), density, 1, bias=groups == 1, last=False)


if __name__ == "__main__":
    torch.set_num_threads(2)
    check_panels()
    check_random_layers(int(sys.argv[1]), int(sys.argv[2]))
    print(ops.cpu()[0])
