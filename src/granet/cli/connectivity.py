"""`granet connectivity`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """Overlap of masks between runs and through the checkpoints of a run, units cut off, exploration R_s.

examples:
  granet connectivity runs/digits-granet-3f9a1c
  granet connectivity runs/digits-granet-* --out overlap
  granet train --train.keep 10ep 20ep 30ep             keeps the checkpoints of these moments to look at"""


@dataclass(frozen=True)
class Arguments:
    """Which runs, and where the figure goes."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("connectivity")
    """Folder of numbers, figure and page."""


def main(args: list[str]) -> int:
    """Prints the tables, writes numbers and figure; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet connectivity", description=DESCRIPTION)

    from granet.lab.connectivity import connectivity_of
    from granet.report import page as report

    report.require()
    found = connectivity_of(arguments.runs)
    say(found)
    if found.overlaps:
        say()
        for what, path in found.write(arguments.out).items():
            say(f"{what}: {path}")
    return 0
