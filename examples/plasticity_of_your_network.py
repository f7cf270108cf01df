"""Measure the pruning plasticity of a network of your own: how well it recovers when it is pruned at some moment.

    python examples/plasticity_of_your_network.py --epochs 6 --rates 0.5 0.9

The network is trained once and its state is kept after every epoch. From each of these moments a copy is pruned by
magnitude, trained on for one epoch at the learning rate of that moment, and tested. Pruning plasticity (Liu et al.,
2021, section 3) is the accuracy after that epoch minus the accuracy just before the pruning.
`granet plasticity` does the same for recipes, with more arms, seeds and statistics.
"""

import argparse
from copy import deepcopy

import torch
from image_classifier import digits, network
from torch import nn
from torch.nn import functional as F

import granet


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of images that `model` names rightly."""
    model.eval()
    with torch.no_grad():
        share = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return share


def epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, batch: int = 64
) -> None:
    """One pass over the training images in random order."""
    for rows in torch.randperm(len(x)).split(batch):
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def main(arguments: list[str] | None = None) -> dict[tuple[int, float], float]:
    """Prints a table, and returns (epoch, pruning rate) to plasticity in percentage points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--epochs", type=int, default=6, help="epochs of training; the learning rate drops after half of them"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 0.9], help="shares of the weights to prune at once"
    )
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = network()
    optimizer = optimizer_of(model, lr=0.1)
    plasticity = {}
    print("epoch     lr  before " + " ".join(f"{f'-{rate:.0%}':>8}" for rate in args.rates))
    for number in range(1, args.epochs + 1):
        lr = 0.1 if number <= (args.epochs + 1) // 2 else 0.01
        for group in optimizer.param_groups:
            group["lr"] = lr
        epoch(model, optimizer, x, y)
        before = accuracy(model, test_x, test_y)
        for rate in args.rates:
            pruned = deepcopy(model)
            # prune once, to `rate`, at the first step; the mask then stays as it is
            sparsifier = granet.Sparsifier(pruned, granet.GMP(sparsity=rate, end=1, interval=1))
            again = optimizer_of(pruned, lr)
            sparsifier.attach(again)
            epoch(pruned, again, x, y)
            plasticity[number, rate] = 100 * (accuracy(pruned, test_x, test_y) - before)
        row = " ".join(f"{plasticity[number, rate]:>+8.2f}" for rate in args.rates)
        print(f"{number:>5} {lr:>6} {before:>7.2%} {row}")
    return plasticity


if __name__ == "__main__":
    main()
