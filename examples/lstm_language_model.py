"""An LSTM language model on characters, pruned gradually from dense by GMP and, beside it, by GraNet.

    python examples/lstm_language_model.py --sparsity 0.9 --steps 400

Recurrent weights are sparse like any others: torch's LSTM keeps them as `weight_ih_l0` and `weight_hh_l0`.
"""

import argparse

import text
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import granet


class LanguageModel(nn.Module):
    """Embedding, LSTM and output layer; returns logits of shape (n, length, characters)."""

    def __init__(self, characters: int, width: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def train(method: granet.Method, steps: int) -> tuple[float, float]:
    """The validation loss in nats per character, and the sparsity, after `steps` steps with `method`."""
    torch.manual_seed(0)
    training, validation, characters = text.characters()
    model = LanguageModel(characters)
    sparsifier = granet.Sparsifier(model, method, skip="head")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer)
    for _ in range(steps):
        x, y = text.batch(training, 32, 48)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        sparsifier.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x, y = text.batch(validation, 64, 48)
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item(), sparsifier.sparsity


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Trains with both methods, prints a table and returns method to (validation loss, sparsity)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of weights that are zero at the end")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    args = parser.parse_args(arguments)
    end, interval = max(1, args.steps * 3 // 4), max(1, args.steps // 20)
    methods = {
        "dense": granet.Dense(),
        "GMP": granet.GMP(sparsity=args.sparsity, end=end, interval=interval),
        "GraNet": granet.GraNet(
            sparsity=args.sparsity, initial_sparsity=0.0, end=end, total=args.steps, interval=interval
        ),
    }
    results = {name: train(method, args.steps) for name, method in methods.items()}
    print(f"{'method':<8} {'loss':>6} {'sparsity':>9}")
    for name, (loss, sparsity) in results.items():
        print(f"{name:<8} {loss:>6.3f} {sparsity:>9.2%}")
    return results


if __name__ == "__main__":
    main()
