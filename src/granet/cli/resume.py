"""`granet resume`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from granet.cli import words

DESCRIPTION = """Go on with a run that was stopped, from its last checkpoint; the result is the same to the bit.

With --epochs a run, finished or not, is trained further than its recipe says: in a new directory beside it, while the
old one stays as it is. What the recipe has in shares of the training stays at the steps where it was, so the method is
done when it was done. The learning rate stays at its last value (multistep, constant), or becomes at once that of a
training of the whole length (cosine).

examples:
  granet resume runs/digits-granet-3f9a1c
  granet resume runs/digits-granet-3f9a1c --epochs 80"""


@dataclass(frozen=True)
class Arguments:
    """Which run."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    epochs: int | None = None
    """Epochs in all, more than the recipe has."""


def main(args: list[str]) -> int:
    """Trains a run to its end; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet resume", description=DESCRIPTION)

    from granet import ranks
    from granet.cli.session import train_all
    from granet.train.run import Run, extend

    if arguments.epochs is None:
        return train_all([Run.open(arguments.run)])
    with ranks.joined() as here:
        path = here.decide(lambda: extend(Run.open(arguments.run), arguments.epochs))
        return train_all([Run.open(path)])
