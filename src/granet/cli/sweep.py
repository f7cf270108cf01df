"""`granet sweep`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from granet.cli import words

if TYPE_CHECKING:
    from granet.cli.terminal import Console
    from granet.lab.sweep.grid import Sweep
    from granet.lab.sweep.run import Done

from granet.cli.terminal import say

DESCRIPTION = """Train a grid of recipes, methods, settings and seeds, and compare them in a table.

The same command continues where it was stopped; finished runs are not trained again.

Any setting of a recipe can be given, as to `granet train`: --train.epochs 3, --method.sparsity 0.8 0.9. It holds for
all methods, in place of what the sweep says; several values make a run each. Tables go to a folder that says so.

examples:
  granet sweep digits                          a sweep of the package, in two minutes
  granet sweep digits --train.epochs 3 --seeds 0 1
                                               the same, shorter and with other seeds
  granet sweep mine.toml --jobs 4              a file of your own, four runs at a time
  granet sweep mine.toml --dry-run             what it would train
  granet sweep mine.toml --executor ray        on a Ray cluster, or here; pip install "granet[ray]"
  granet sweep mine.toml --executor slurm --option timeout_min 240 slurm_partition gpu"""

FAILURES = 3  # whose last lines are shown; all are kept


@dataclass(frozen=True)
class Arguments:
    """What to train, and where."""

    sweep: tyro.conf.Positional[str] = "digits"
    """A sweep of the package, as `granet ls sweeps` lists them, or a TOML file."""
    runs: Path = Path("runs")
    """Folder of run directories."""
    out: Path | None = None
    """Folder of the tables and plots; sweeps/NAME if not given."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of those of the sweep."""
    jobs: int | None = None
    """Number of runs at a time; by default one per processor, one on a GPU, all at once on a cluster."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Where the runs are trained."""
    option: dict[str, str] = field(default_factory=dict)
    """Options of the executor, such as num_gpus 1 for ray, timeout_min 240 for slurm."""
    dry_run: bool = False
    """Check everything and list the runs, but train none."""


def main(args: list[str]) -> int:
    """Runs the sweep, shows the table and writes the report; returns the exit code, 1 if runs failed."""
    from granet.lab import override
    from granet.lab.sweep import grid

    rest, settings = override.split(args)
    arguments = words.read(Arguments, rest, prog="granet sweep", description=DESCRIPTION, also=override.FLAGS)

    from granet.cli.terminal import Console
    from granet.lab import pool
    from granet.report import page as report

    report.require()
    pool.check(arguments.executor, arguments.jobs, arguments.option)
    sweep = override.laid_over(grid.load(arguments.sweep), settings, arguments.seeds)
    cells = grid.cells(sweep)

    import yaml

    from granet.cli.progress import stoppable
    from granet.lab.sweep import run as lab

    console = Console()
    lab.check(cells)
    todo = lab.planned(cells, arguments.runs)
    if arguments.dry_run:
        for done in todo:
            say(f"{'finished' if done.summary else 'to train'}  {_title(sweep, done)}  {done.run.path}")
        return 0
    options = {key: yaml.safe_load(value) for key, value in arguments.option.items()}
    ended: list[Done] = []
    with stoppable() as stop, Board(sweep, todo, console) as board:
        for done in lab.run(todo, executor=arguments.executor, jobs=arguments.jobs, options=options, stop=stop):
            ended.append(done)
            board.show(done)
        stopped = stop()
    ended += [done for done in todo if done.run not in [one.run for one in ended]]  # never begun
    show(sweep, ended, arguments.out or Path("sweeps") / sweep.name, console)
    failed = [done for done in ended if done.error is not None]
    for done in failed[:FAILURES]:
        console.print(f"\n{_title(sweep, done)} failed:", markup=False, highlight=False)
        console.print("\n".join(done.error.splitlines()[-5:]), markup=False, highlight=False, soft_wrap=True)
    if failed:
        where = failed[0].run.path / "error.txt"
        say(
            f"\n{len(failed)} of {len(todo)} runs failed; their last output is in {where}"
            + " and so on" * (len(failed) > 1)
        )
    if stopped:
        missing = sum(done.summary is None for done in ended)
        say(f"stopped with {missing} of {len(todo)} runs to go; the same command continues")
        return 130
    return 1 if failed else 0


def show(sweep: "Sweep", ended: "list[Done]", out: Path, console: "Console") -> None:
    """Prints the table and writes it to ``out`` as Markdown, CSV and a page with plots."""
    from granet.lab.sweep import page, table

    lines = table.rows(sweep, ended)
    if not lines:
        return
    say(f"\n{table.text(sweep, lines)}")
    found = table.gaps(sweep, lines)
    if found:
        say("\n" + "\n".join(map(str, found)))
    written = page.write(sweep, lines, ended, out)
    console.print(
        "\n" + "\n".join(f"{what}: {path}" for what, path in written.items()), highlight=False, soft_wrap=True
    )


def _title(sweep: "Sweep", done: "Done") -> str:
    from granet.lab.sweep.grid import place

    keys = dict.fromkeys(("method.sparsity", *sweep.varied))
    settings = {key.partition(".")[2]: done.cell.at(key) for key in keys}
    return place(done.cell.task, done.cell.label, settings | {"seed": done.cell.recipe.seed})


class Board:
    """One display for all runs: on a terminal a bar and a line per active run, else one line when a run ends."""

    def __init__(self, sweep: "Sweep", todo: "list[Done]", console: "Console"):
        from rich.live import Live

        self._sweep, self._console = sweep, console
        self._todo = {done.run.path: done for done in todo if done.summary is None}
        self._total, self._ended, self._failed = len(todo), 0, 0
        self._live = Live(
            console=console, get_renderable=self._picture, auto_refresh=True, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def show(self, done: "Done") -> None:
        """Takes a run that has ended."""
        self._todo.pop(done.run.path, None)
        self._ended += 1
        self._failed += done.error is not None
        if done.summary:
            said = f"test {done.summary['last']['test_accuracy']:.2%}  {done.summary['seconds']:.1f} s"
        else:
            said = "stopped" if done.error is None else f"failed: {done.error.splitlines()[-1]}"
        number = f"{self._ended:{len(str(self._total))}}/{self._total}"
        line = f"{number}  {_title(self._sweep, done)}  {said}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _picture(self):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        failed = f", {self._failed} failed" if self._failed else ""
        head.add_row(
            f"{self._sweep.name}: {self._ended} of {self._total} runs{failed}",
            ProgressBar(total=self._total, completed=self._ended, width=40),
        )
        lines = []
        for path, done in list(self._todo.items()):
            epoch = last_epoch(path / "metrics.jsonl")
            if epoch is not None:
                of = done.cell.recipe.train.epochs
                lines.append(Text(f"  {_title(self._sweep, done)}: epoch {epoch:.1f} of {of}"))
        return Group(head, *lines[: self._console.height - 4])


def last_epoch(metrics: Path) -> float | None:
    """Returns how far the run is that writes ``metrics``, in epochs; None before its first record."""
    from granet import files
    from granet.parsing import from_json

    try:
        lines = files.tail(metrics, 8192).split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):  # behind the last line end is nothing, or a line half written
        try:
            return float(from_json(line)["epoch"])
        except (ValueError, LookupError, TypeError, OverflowError):  # cut off at the front
            continue
    return None
