"""Training one run after the other in front of a user, with the table and the report at the end."""

from pathlib import Path

from rich.text import Text

from granet import ranks
from granet.cli.progress import Watcher, show_log, stoppable
from granet.cli.terminal import Console
from granet.report import page as report
from granet.report.rundata import RunData, read_run
from granet.train.run import Run, execute


def train_all(runs: list[Run]) -> int:
    """Trains the runs, each from where it stands; returns the exit code, 130 if the user stopped.

    Under torchrun all processes train each of them together, and the first one talks.
    """
    report.require()  # before any work: the report comes last
    with ranks.joined() as here:
        console = Console(quiet=not here.first)
        show_log(console)
        for run in runs:
            moved = here.decide(lambda run=run: elsewhere(run))
            if moved is not None:
                console.print(f"{run.path}: {moved}", soft_wrap=True)
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


def elsewhere(run: Run) -> str | None:
    """Returns what to say of a run that was begun with the data in another folder than is asked for now.

    Data may have moved, so it is the same run; nobody can tell whether they are the same data.
    """
    before = Run.open(run.path).recipe.data.root if (run.path / "recipe.yaml").is_file() else run.recipe.data.root
    if before == run.recipe.data.root:
        return None
    old, new = (root or "the default folder" for root in (before, run.recipe.data.root))
    return f"its data were in {old}, not in {new}; if they are other data, give another folder with --runs"


def show(paths: list[Path], page: Path, console: Console, *, subject: Path | None = None) -> None:
    """Prints the table of the runs and writes their report, whose first numbers are about the run `subject`."""
    show_runs([read_run(path) for path in paths], page, console, subject=subject)


def show_runs(
    runs: list[RunData], page: Path, console: Console, note: str = "", *, subject: Path | None = None
) -> None:
    """Prints the tables of runs and writes their report; what is not a terminal gets whole lines, however long."""
    terminal = console.is_terminal
    for title, table in report.summary_tables(runs, console.width if terminal else None):
        if title:
            console.print(title, markup=False, highlight=False, soft_wrap=True)
        if terminal:
            console.print(table)
        else:
            Console(file=console.file, width=10_000).print(table)
    report.write_report(runs, page, subject=subject)
    console.print(f"report: {page}{note}", markup=False, highlight=False, soft_wrap=True)
