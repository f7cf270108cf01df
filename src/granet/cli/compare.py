"""`granet compare`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

DESCRIPTION = """Table and plots of several runs.

examples:
  granet compare runs/*
  granet compare runs/digits-granet-3f9a1c runs/digits-dense-9da6c8 --report twins.html"""


@dataclass(frozen=True)
class Arguments:
    """Which runs, and where the plots go."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    report: Path = Path("compare.html")
    """Where to write the plots."""


def main(args: list[str]) -> int:
    """Prints the table and writes the report; returns the exit code."""
    arguments = tyro.cli(Arguments, args=args, prog="granet compare", description=DESCRIPTION)
    if not arguments.runs:
        raise ValueError("which runs? `granet compare runs/*`")

    from granet.cli.session import show
    from granet.cli.terminal import Console

    show(list(arguments.runs), arguments.report, Console())
    return 0
