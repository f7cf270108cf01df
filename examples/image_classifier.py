"""Train a small convolutional network sparsely with RigL and with GraNet, and compare both with the dense network.

    python examples/image_classifier.py --sparsity 0.9 --steps 300

The images are scikit-learn's handwritten digits (1,797 of 8 x 8 pixels), so nothing is downloaded.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import granet


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then test images and labels; images of shape (n, 1, 8, 8), values from 0 to 1."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def network() -> nn.Sequential:
    """A convolutional network of about 90,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def train(method: granet.Method, steps: int, batch: int = 64, seed: int = 0) -> tuple[float, float]:
    """The test accuracy and the final sparsity of a network trained for `steps` steps with `method`."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(seed)
    model = network()
    sparsifier = granet.Sparsifier(model, method, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparsifier.attach(optimizer)  # from here on the loop is the usual one

    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return accuracy, sparsifier.sparsity


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Trains with every method, prints a table and returns method to (test accuracy, sparsity)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of weights that are zero at the end")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (22 are an epoch)")
    args = parser.parse_args(arguments)

    interval = max(1, args.steps // 20)
    methods = {
        "dense": granet.Dense(),
        "RigL": granet.RigL(sparsity=args.sparsity, end=max(1, args.steps * 3 // 4), interval=interval),
        "GraNet": granet.GraNet(
            sparsity=args.sparsity,
            initial_sparsity=0.5,
            end=max(1, args.steps // 2),
            total=args.steps,
            interval=interval,
        ),
    }
    results = {name: train(method, args.steps) for name, method in methods.items()}
    print(f"{'method':<8} {'accuracy':>9} {'sparsity':>9}")
    for name, (accuracy, sparsity) in results.items():
        print(f"{name:<8} {accuracy:>9.2%} {sparsity:>9.2%}")
    return results


if __name__ == "__main__":
    main()
