"""`granet sensitivity`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """Layer sensitivity: accuracy of a run's network with one layer at a time pruned, nothing retrained.

examples:
  granet sensitivity runs/digits-dense-9da6c8
  granet sensitivity runs/digits-dense-9da6c8 --sparsities 0.9 0.99 --batch-norm 8
  granet sensitivity runs/digits-dense-9da6c8 --split validation --write layers.yaml --sparsity 0.95
  granet train layers.yaml               with as many weights in each layer as its sensitivity asks for"""


@dataclass(frozen=True)
class Arguments:
    """Which run, pruned how far, measured on what."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    """Sparsities of the layer that is pruned."""
    checkpoint: Literal["best", "last"] | None = None
    """Best by validation at target sparsity, or the last; the best if there is one, else the last, if not given."""
    batch_norm: int = 0
    """Training batches on which batch-norm statistics are recomputed after each pruning; 0 keeps those of training."""
    split: Literal["train", "validation", "test"] = "test"
    """Images to measure on."""
    out: Path | None = None
    """Folder of numbers, figure and page; the folder sensitivity in the run if not given."""
    write: Path | None = None
    """Recipe to write, in which layers that lose little are sparser than those that lose much."""
    sparsity: float = 0.9
    """Sparsity of that recipe's network."""
    method: Literal["static", "rigl"] = "rigl"
    """Method of that recipe; these two keep the number of weights in each layer."""


def main(args: list[str]) -> int:
    """Prints the table, writes numbers and figure; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet sensitivity", description=DESCRIPTION)

    from granet import files
    from granet.lab import layer_densities
    from granet.lab.sensitivity import layer_sensitivity
    from granet.report import page as report
    from granet.train.run import Run

    report.require()
    if arguments.write is not None and arguments.write.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--write {arguments.write}: a recipe is a YAML file, whose name ends in .yaml")
    if arguments.write is not None and arguments.split == "test":
        say("note: the recipe is chosen on the test images; --split validation keeps them for the end")
    found = layer_sensitivity(
        arguments.run,
        sparsities=arguments.sparsities,
        which=arguments.checkpoint,
        batch_norm=arguments.batch_norm,
        split=arguments.split,
    )
    say(found)
    say()
    for what, path in found.write(arguments.out or files.within(arguments.run, "sensitivity")).items():
        say(f"{what}: {path}")
    if arguments.write is not None:
        recipe = Run.open(arguments.run).recipe
        wanted = arguments.sparsity, arguments.method, arguments.write.stem
        layer_densities.write(arguments.write, layer_densities.recipe_with(recipe, found, *wanted), found)
        say(f"recipe: {arguments.write}; train it with: granet train {arguments.write}")
    return 0
