"""Training one run after the other in front of a user, with the table and the report at the end."""

from pathlib import Path

from rich.console import Console

from granet.cli.progress import Watcher, show_log, stoppable
from granet.report import read_run, summary_table, write_report
from granet.run import Run, execute


def train_all(runs: list[Run]) -> int:
    """Trains the runs, each from where it stands; returns the exit code, 130 if the user stopped."""
    console = Console()
    show_log(console)
    for run in runs:
        if run.summary is not None:
            console.print(f"[bold]{run.path}[/] is finished already", highlight=False, soft_wrap=True)
            continue
        console.print(f"[bold]{run.path}[/]", highlight=False, soft_wrap=True)
        with stoppable() as stop, Watcher(run.recipe.name, console) as watch:
            finished = execute(run, watch=watch, stop=stop)
        if finished is None:
            console.print(f"stopped; go on with: granet resume {run.path}", highlight=False, soft_wrap=True)
            return 130
    show([run.path for run in runs], runs[0].report, console)
    return 0


def show(paths: list[Path], report: Path, console: Console) -> None:
    """Prints the table of the runs and writes their report."""
    read = [read_run(path) for path in paths]
    console.print(summary_table(read))
    write_report(read, report)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
