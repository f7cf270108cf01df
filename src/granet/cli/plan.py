"""`granet plan`."""

from dataclasses import dataclass

from granet.cli.arguments import parse
from granet.cli.terminal import say

DESCRIPTION = """Every parameter of a recipe's network: sparse or not and why, its shape, its first and last budget.

examples:
  granet plan cifar10-resnet50
  granet plan cifar10-resnet50 --method rigl --method.sparsity 0.98 --model.keep-dense stem.0.weight"""

NOMINAL = 1000  # steps per epoch of a dataset that is not here; no budget depends on it


@dataclass(frozen=True)
class Options:
    """This command has no options of its own."""


def main(args: list[str]) -> int:
    """Prints the plan; returns the exit code."""
    recipe = parse(args, Options, prog="granet plan", description=DESCRIPTION).recipe

    from granet.text import worded
    from granet.train import data, models

    source = data.DATASETS[recipe.data.name]
    steps_per_epoch = NOMINAL
    if source.locate(recipe.data.root):
        there = data.load(recipe.data.name, root=recipe.data.root, validation=recipe.data.validation)
        steps_per_epoch = data.steps_per_epoch(
            len(there.train), recipe.train.batch_size, drop_last=not recipe.train.partial_batch
        )
    else:
        say(f"{recipe.data.name} is not on this machine, so an epoch is taken to have {NOMINAL} steps\n")
    model = models.build(recipe.model.name, classes=source.classes, in_channels=source.shape[0])
    say(worded(str(recipe.plan(model, steps_per_epoch))))
    return 0
