"""`granet lottery`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from granet.cli.arguments import Request, parse

DESCRIPTION = """Train, prune, go back, train again: lottery tickets, and one-shot pruning with fine-tuning.

The same command continues where it was stopped. Every level is a run directory of its own.

examples:
  granet lottery                                             digits: 10 levels to 90 %, back to the initial weights
  granet lottery fashion --lottery.rewind 500it              back to step 500
  granet lottery fashion --lottery.mode learning-rate        the weights stay, the learning rate goes back
  granet lottery fashion --lottery.levels 1 --lottery.mode learning-rate --lottery.rewind 75%
                                                             one-shot, fine-tuned for the last quarter again"""


@dataclass(frozen=True)
class Procedure:
    """What happens at every level."""

    sparsity: float = 0.9
    """Share of inactive weights after the last level."""
    levels: int = 10
    """Number of pruning rounds; each prunes the same share of the remaining weights."""
    rewind: str = "0"
    """The step that a level goes back to: epochs, 500it, or 75% of the training."""
    mode: Literal["weights", "learning-rate"] = "weights"
    """What goes back: weights and learning rate, or the learning rate alone."""
    scope: Literal["global", "layerwise"] = "global"
    """Whether weights compete in all layers together, or within each layer."""


@dataclass(frozen=True)
class Options:
    """The procedure, and where its runs go."""

    lottery: Annotated[Procedure, tyro.conf.arg(name="lottery")] = Procedure()
    """The procedure."""
    runs: Path = Path("runs")
    """Folder of run directories."""


def main(args: list[str]) -> int:
    """Trains all levels, shows their table and writes the report; returns the exit code, 130 if the user stopped."""
    request = parse(args, Options, prog="granet lottery", description=DESCRIPTION, method="dense")
    return train(request)


def train(request: Request) -> int:
    """Trains what is not trained yet."""
    import dataclasses

    from granet.cli.progress import Watcher, show_log, stoppable
    from granet.cli.session import show
    from granet.cli.terminal import Console
    from granet.lab import lottery
    from granet.report import page as report

    report.require()
    console = Console()
    show_log(console)
    procedure = lottery.Lottery(**dataclasses.asdict(request.options.lottery))
    done = []
    with stoppable() as stop, Watcher("", console) as watch:

        def begin(level: lottery.Level) -> None:
            watch.title = level.run.path.name
            console.print(str(level.run.path), style="bold", soft_wrap=True)

        places = {"stop": stop, "watch": watch, "begin": begin}
        for level in lottery.run(request.recipe, procedure, request.options.runs, **places):
            sparsity, last = level.summary["sparsity"], level.summary["last"]["test_accuracy"]
            console.print(f"level {level.number}: {sparsity:.1%} sparse, {last:.2%} on the test set", highlight=False)
            done.append(level.run.path)
    if len(done) <= procedure.levels:
        console.print("stopped; the same command continues", highlight=False)
        return 130
    show(done, done[-1] / "levels.html", console, subject=done[-1])
    return 0
