"""A GAN with a sparse generator and a sparse discriminator, each with an optimizer and a sparsifier of its own.

    python examples/gan.py --sparsity 0.8 --steps 400

The generator learns to draw points on a ring. The two networks are stepped at different times, so each has its own
sparsifier: a sparsifier counts the steps of the optimizers that it is attached to, and of no others.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import granet


def ring(n: int) -> Tensor:
    """Points around the unit circle, of shape (n, 2)."""
    angle = torch.rand(n) * 2 * torch.pi
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.02 * torch.randn(n, 2)


def network(inputs: int, outputs: int, width: int = 128) -> nn.Sequential:
    """A perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    """Trains both networks; returns the mean distance of drawn points from the circle and both sparsities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of weights that are zero")
    parser.add_argument(
        "--steps", type=int, default=400, help="steps of the generator; the discriminator takes two for each"
    )
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator, discriminator = network(8, 2), network(2, 1)
    interval = max(1, args.steps // 20)
    optimizers, sparsifiers = [], []
    for model, steps in ((generator, args.steps), (discriminator, 2 * args.steps)):
        method = granet.RigL(sparsity=args.sparsity, end=max(1, steps * 3 // 4), interval=interval)
        sparsifiers.append(granet.Sparsifier(model, method))
        optimizers.append(torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.999)))
        sparsifiers[-1].attach(optimizers[-1])

    for _ in range(args.steps):
        for _ in range(2):
            fake = generator(torch.randn(128, 8)).detach()
            loss = F.softplus(-discriminator(ring(128))).mean() + F.softplus(discriminator(fake)).mean()
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        loss = F.softplus(-discriminator(generator(torch.randn(128, 8)))).mean()
        optimizers[0].zero_grad()
        loss.backward()  # also leaves gradients in the discriminator, which its own zero_grad() removes
        optimizers[0].step()

    with torch.no_grad():
        distance = (generator(torch.randn(1000, 8)).norm(dim=1) - 1).abs().mean().item()
    print(f"drawn points lie {distance:.3f} from the circle on average")
    for name, sparsifier in zip(("generator", "discriminator"), sparsifiers, strict=True):
        print(f"{name}: {sparsifier.active:,} of {sparsifier.total:,} weights after {sparsifier.step} steps")
    return distance, sparsifiers[0].sparsity, sparsifiers[1].sparsity


if __name__ == "__main__":
    main()
