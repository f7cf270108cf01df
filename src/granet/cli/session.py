"""Training one run after the other in front of a user, with the table and the report at the end."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from granet import ranks
from granet.cli.progress import Watcher, show_log, stoppable
from granet.cli.terminal import Console
from granet.run import Run, execute

if TYPE_CHECKING:
    from granet.report import RunData


def train_all(runs: list[Run]) -> int:
    """Trains the runs, each from where it stands; returns the exit code, 130 if the user stopped.

    Under torchrun all processes train each of them together, and the first one talks.
    """
    with ranks.joined() as here:
        console = Console(quiet=not here.first)
        show_log(console)
        for run in runs:
            if here.decide(lambda run=run: run.summary is not None):
                console.print(Text.assemble((str(run.path), "bold"), " is finished already"), soft_wrap=True)
                continue
            console.print(str(run.path), style="bold", soft_wrap=True)
            with stoppable() as stop, Watcher(run.recipe.name, console) as watch:
                finished = execute(run, watch=watch, stop=stop)
            if finished is None:
                console.print(f"stopped; go on with: granet resume {run.path}", highlight=False, soft_wrap=True)
                return 130
    if here.first:
        show([run.path for run in runs], runs[0].report, console)
    return 0


def show(paths: list[Path], report: Path, console: Console) -> None:
    """Prints the table of the runs and writes their report."""
    from granet.report import read_run, summary_table, write_report

    read = [read_run(path) for path in paths]
    table = summary_table(read)
    if Measurement.get(console, console.options.update(max_width=1000), table).maximum > console.width:
        table = upright(read)
    console.print(table)
    write_report(read, report)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def upright(runs: list["RunData"]) -> Table:
    """Returns the same table for a narrow terminal: a line a quantity, a column a run."""
    from granet.report import COLUMNS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for heading, text in COLUMNS[1:]:
        table.add_row(heading, *(text(run, run.name) for run in runs))
    return table
