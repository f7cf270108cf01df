"""Accuracy of the methods side by side: a grid of methods, sparsities and seeds on one recipe, and its table.

    python benchmarks/accuracy.py fashion-mlp --epochs 10 --out results/fashion-mnist.md

Runs that are finished are not trained again, so the same command goes on where it was stopped. Every run has the same
number of steps, the same data order for its seed, and the same rule of selection: the test set is looked at once, with
the weights of the last step, and with those that were best on the validation split at the final sparsity.
"""

import argparse
import os
import platform
import statistics
from datetime import date
from pathlib import Path

import torch

from granet import recipes
from granet.recipe import validate
from granet.run import Run, execute
from granet.selection import columns

METHODS = ("static", "set", "rigl", "gmp", "granet-d2s", "granet")
TITLES = {
    "dense": "dense",
    "static": "static ERK",
    "set": "SET (ERK)",
    "rigl": "RigL",
    "gmp": "GMP",
    "granet-d2s": "GraNet (s_i = 0)",
    "granet": "GraNet (s_i = 0.5)",
}


def the_run(args, method, sparsity, seed):
    """The run of one cell of the grid."""
    values = recipes.load(args.recipe, method=method).model_dump()
    values["seed"] = seed
    values["train"] |= {"epochs": args.epochs, "threads": args.threads}
    if sparsity is not None:
        values["method"] |= {"sparsity": sparsity}
    return Run.of(validate(values, source=args.recipe), args.runs)


def spread(values):
    """Mean and standard deviation in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} +- {100 * deviation:.2f}"


def row(method, sparsity, summaries):
    first = summaries[0]
    return [
        TITLES[method],
        "" if sparsity is None else f"{sparsity:.0%}",
        f"{first['parameters']['active']:,}",
        spread([s["last"]["test_accuracy"] for s in summaries]),
        spread([s["best"]["test_accuracy"] for s in summaries]),
        f"{statistics.mean(s['flops']['inference'] / s['flops']['inference_dense'] for s in summaries):.3f}",
        f"{statistics.mean(s['flops']['training'] / s['flops']['training_dense'] for s in summaries):.3f}",
        str(len(summaries)),
    ]


def table(done):
    head = ["method", "sparsity", "active", "last, test %", "best, test %", "inference x", "training x", "n"]
    body = [row(method, sparsity, list(runs.values())) for (method, sparsity), runs in done.items() if runs]
    return columns([head, *body], right=(1, 2, 3, 4, 5, 6, 7))


def verdict(done, sparsities):
    """What the last accuracies say of GraNet, computed: a difference counts beyond two standard errors of it."""
    lines = []
    for sparsity in sparsities:
        accuracies = {m: [s["last"]["test_accuracy"] for s in done[m, sparsity].values()] for m in METHODS}
        for ours, others in (("granet", ("static", "set", "rigl")), ("granet-d2s", ("gmp",))):
            for other in others:
                a, b = accuracies[ours], accuracies[other]
                gap = 100 * (statistics.mean(a) - statistics.mean(b))
                error = 100 * (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
                word = "no clear difference" if abs(gap) <= 2 * error else "better" if gap > 0 else "worse"
                lines.append(f"- {sparsity:.0%}: {TITLES[ours]} - {TITLES[other]} = {gap:+.2f} +- {error:.2f}: {word}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cells = [("dense", None), *((method, sparsity) for sparsity in args.sparsities for method in METHODS)]
    done = {cell: {} for cell in cells}
    for seed in args.seeds:
        for cell in cells:
            run = the_run(args, *cell, seed)
            done[cell][seed] = summary = execute(run)
            print(f"{run.path.name}  {summary['last']['test_accuracy']:.2%}  {summary['seconds']:.0f} s", flush=True)
        if args.out:
            args.out.write_text(page(args, done))
    print(table(done))


def page(args, done):
    seeds = sorted({seed for runs in done.values() for seed in runs})
    command = f"python benchmarks/accuracy.py {args.recipe} --epochs {args.epochs} --out {args.out}"
    complete = len(seeds) > 1
    return f"""# {args.recipe}, {args.epochs} epochs

`{command}`, {date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}.
Mean and standard deviation over seeds {", ".join(map(str, seeds))}; test accuracy of the last step's weights, and of
those best on the held-out validation split at the final sparsity. FLOPs relative to dense (granet.flops).

```
{table(done)}
```

## Does GraNet win here?

Gap in points of last accuracy, with its standard error; a difference is called one beyond two standard errors.

{verdict(done, args.sparsities) if complete else "One seed says nothing about this."}
"""


if __name__ == "__main__":
    main()
