"""`granet resume`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from granet.cli import words

DESCRIPTION = """Go on with a run that was stopped, from its last checkpoint; the result is the same to the bit.

example:
  granet resume runs/digits-granet-3f9a1c"""


@dataclass(frozen=True)
class Arguments:
    """Which run."""

    run: tyro.conf.Positional[Path]
    """Run directory."""


def main(args: list[str]) -> int:
    """Trains a run to its end; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet resume", description=DESCRIPTION)

    from granet.cli.session import train_all
    from granet.train.run import Run

    return train_all([Run.open(arguments.run)])
