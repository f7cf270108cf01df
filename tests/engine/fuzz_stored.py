"""The kernels of linear layers in sparse storage against dense products, with random shapes, densities and threads.

`python tests/engine/fuzz_stored.py CALLS SEED` fails on the first wrong number.
"""

import random
import sys

import torch

from granet import native

TOLERANCE = 1e-5  # of the largest value


def check(rng: random.Random) -> None:
    """Raises AssertionError unless the product and both gradients are those of the dense weight."""
    images, inputs, outputs = (
        rng.choice([1, rng.randrange(1, 40), rng.randrange(1, most)]) for most in (300, 900, 200)
    )
    density, threads = rng.choice([0.0, 0.05, 0.3, rng.random(), 1.0]), rng.choice([1, 2, 3, 7])
    torch.manual_seed(rng.randrange(1 << 30))
    torch.set_num_threads(threads)
    mask = torch.rand(outputs, inputs) < density
    positions, spare = mask.view(-1).nonzero().squeeze(1).int(), rng.choice([0, 3])
    values = torch.cat([torch.randn(len(positions)), torch.full((spare,), float("nan"))])  # room that nobody reads
    weight = torch.zeros(outputs, inputs).masked_scatter(mask, values[: len(positions)]).double()
    x, dy = torch.randn(images, inputs), torch.randn(images, outputs)
    bias = torch.randn(outputs) if rng.random() < 0.5 else None
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    what = f"{images} x {inputs} x {outputs} at density {density:.2f}, {threads} threads"
    same(torch.ops.granet.stored_forward(x, values, positions, bias, outputs), expected, f"output, {what}")
    needs = rng.random() < 0.8, rng.random() < 0.8
    dx, grad = torch.ops.granet.stored_backward(dy, x, values, positions, *needs)
    if needs[0]:
        same(dx, dy.double() @ weight, f"gradient of the input, {what}")
    if needs[1]:
        same(grad[: len(positions)], (dy.double().T @ x.double())[mask], f"gradient of the values, {what}")
        assert not grad[len(positions) :].any()


def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises AssertionError unless both are the same within rounding."""
    assert found.shape == expected.shape, what
    if expected.numel():
        error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        assert error <= TOLERANCE * (scale + 1.0), f"{what}: off by {error:.2e} at a scale of {scale:.2e}"


def main(calls: int, seed: int) -> None:
    """Checks random calls."""
    native.load()
    rng = random.Random(seed)
    for _ in range(calls):
        check(rng)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
