"""How far a weight that was just grown moves at first, under many optimizers, beside the weights around it.

    python benchmarks/first_moves.py [--methods SET RigL GraNet] [--out results/first-moves.csv]

A small network on the digits, an update every 50 of 400 steps. Moves are given in learning rates: of the weights just
grown with the state that the sparsifier gives them (warm), of the same with that state set back to zero (zero), and of
all other active weights in the same step. Those after the first two updates are left out: bias correction is not over.
"""

import argparse
import csv
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import granet
from granet.sparsifier import stepping


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: each weight moves by the learning rate, in the direction of a mean of gradients."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_((mean * 0.9 + p.grad * 0.1).sign(), alpha=group["lr"])
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Lion": lambda p: Lion(p, lr=3e-4),
}
STEPS, INTERVAL, BATCH = 400, 50, 64
METHODS = {
    "SET": lambda: granet.SET(sparsity=0.8, interval=INTERVAL, total=2 * STEPS),
    "RigL": lambda: granet.RigL(sparsity=0.8, interval=INTERVAL, end=STEPS),
    "GraNet": lambda: granet.GraNet(sparsity=0.9, interval=INTERVAL, end=STEPS * 3 // 4, total=STEPS),
}


def moves(method, optimizer, state):
    """The first moves of weights just grown, and those of all other active weights in the same steps."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    sparsifier = granet.Sparsifier(model, METHODS[method]())
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    sparsifier.attach(optimizer)
    weights = {name: p for name, p in model.named_parameters() if name in sparsifier.masks}
    grown, first, others = None, [], []
    for _ in range(STEPS):
        at = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[at]), y[at]).backward()
        masks, version = dict(sparsifier.masks), sparsifier.version
        before = {name: p.detach().clone() for name, p in weights.items()}
        optimizer.step()
        if grown is not None and sparsifier.step > 2 * INTERVAL + 1:
            for name, p in weights.items():
                moved = (p.detach() - before[name]).abs() / optimizer.param_groups[0]["lr"]
                first.append(moved[grown[name]])
                others.append(moved[masks[name] & ~grown[name]])
        grown = None
        if sparsifier.version > version:
            grown = {name: sparsifier.masks[name] & ~masks[name] for name in masks}
            if state == "zero":
                for name, p in weights.items():
                    for buffer in stepping.buffers([optimizer], p):
                        buffer[grown[name]] = 0
    return torch.cat(first), torch.cat(others)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [["method", "optimizer", "weights", "median", "90 %", "largest"]]
    for method in args.methods:
        for optimizer in OPTIMIZERS:
            zero, _ = moves(method, optimizer, "zero")
            warm, others = moves(method, optimizer, "warm")
            for kind, values in (("grown, zero", zero), ("grown, warm", warm), ("others", others)):
                figures = values.median(), values.quantile(0.9), values.max()
                rows.append([method, optimizer, kind, *(f"{float(figure):.3f}" for figure in figures)])
                print(*(f"{cell:<19}" for cell in rows[-1]), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
