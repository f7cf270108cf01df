"""`granet compare`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from granet.cli import words

DESCRIPTION = """Table and plots of several runs.

Only runs with the same data, model, epochs and batch size are compared; others have a table and plots of their own.

examples:
  granet compare runs/*
  granet compare runs/digits-granet-3f9a1c runs/digits-dense-9da6c8 --out twins.html"""


@dataclass(frozen=True)
class Arguments:
    """Which runs, and where the plots go."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("compare.html")
    """Where to write the page. An older page by granet is replaced, any other file is left alone."""


def main(args: list[str]) -> int:
    """Prints the tables and writes the page; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet compare", description=DESCRIPTION)
    if not arguments.runs:
        raise ValueError("no runs were given: give run directories, as in `granet compare runs/*`")

    from granet.cli.session import show_runs
    from granet.cli.terminal import Console, warn
    from granet.report import page as report
    from granet.report.rundata import read_run

    report.require()
    if arguments.out.exists() and not (arguments.out.is_file() and report.is_page(arguments.out)):
        raise ValueError(f"{arguments.out} exists and is not a page written by granet: choose another name with --out")
    runs, problems = [], []
    for path in dict.fromkeys(arguments.runs):
        try:
            runs.append(read_run(path))
        except (ValueError, OSError) as error:
            problems.append(error)
    if not runs:
        raise problems[0]
    for problem in problems:
        warn(f"left out: {problem}")
    note = " (in place of an older one)" if arguments.out.exists() else ""
    show_runs(runs, arguments.out, Console(), note)
    return 0
