"""`granet ls`."""

from dataclasses import dataclass
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """List the available recipes, sweeps, methods, models, datasets or optimizers.

examples:
  granet ls recipes
  granet ls data"""


@dataclass(frozen=True)
class Arguments:
    """What to list."""

    what: tyro.conf.Positional[Literal["recipes", "sweeps", "methods", "models", "data", "optimizers"]] = "recipes"
    """What to list."""


def main(args: list[str]) -> int:
    """Prints names with a line about each; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet ls", description=DESCRIPTION)
    rows, hint = LISTS[arguments.what]()
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        say(f"{name:{width}}  {about}")
    if hint:
        say(f"\n{hint}")
    return 0


def _recipes():
    from granet.train import recipes

    rows = []
    for file in recipes.catalog():
        rows.append((file.name, file.summary))
        rows.append(("", "methods: " + ", ".join(file.methods)))
    hint = (
        "Choose a method with --method NAME, or as in cifar10-vgg19-rigl, its sparsity with --method.sparsity 0.98;\n"
        "granet is sparse-to-sparse from 50 %, granet-d2s dense-to-sparse from 0 %;\n"
        "granet-r01 regrows a tenth of the weights where granet regrows half."
    )
    return rows, hint


def _sweeps():
    from granet.lab.sweep import grid

    return [(name, grid.load(name).summary) for name in grid.names()], "`granet sweep NAME` trains one."


def _methods():
    from granet.methods import METHODS

    rows = []
    for name, method in METHODS.items():
        rows.append((name, " ".join((method.__doc__ or "").split("\n\n")[0].split())))
    return rows, "`granet show digits --method NAME` shows a method's hyper-parameters."


def _models():
    from granet.train.catalog import MODELS

    return [(name, model.description) for name, model in MODELS.items()], None


def _data():
    from granet.train.catalog import DATASETS, data_root

    rows = []
    for name, source in DATASETS.items():
        place = source.locate()
        rows.append((name, source.description))
        rows.append(("", f"here: {place}" if place else "not here. " + source.advice.format(root=data_root())))
    return rows, None


def _optimizers():
    from granet.train.catalog import OPTIMIZERS

    return [(name, optimizer.description) for name, optimizer in OPTIMIZERS.items()], None


LISTS = {
    "recipes": _recipes,
    "sweeps": _sweeps,
    "methods": _methods,
    "models": _models,
    "data": _data,
    "optimizers": _optimizers,
}
