"""`granet plasticity`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from granet.cli import words
from granet.cli.arguments import parse
from granet.cli.terminal import say
from granet.lab.plasticity import study as studies

DESCRIPTION = """Pruning plasticity: prune a network once at moments of its training, and see how well it recovers.

Two measures, as in the GraNet paper: accuracy after k epochs at the learning rate of that moment, against the accuracy
before the pruning; and accuracy after the rest of the normal schedule, against that of the unpruned network. The same
command again goes on where it stopped: what is made is not made again.

RECIPE_OR_RUN is a recipe, a study of the package (plasticity-digits, plasticity-fashion, plasticity-cifar10,
resnet20-paper), or the directory of a finished run, whose own checkpoints are then pruned.

examples:
  granet plasticity                                         handwritten digits, in minutes
  granet plasticity plasticity-digits --seeds 0 1 2         with bands over three seeds
  granet plasticity fashion-mlp --train.schedule multistep --at 3 6 9 12 --retrain 3
  granet plasticity plasticity-cifar10 --jobs 2             ResNet-20 on 6,000 images of CIFAR-10, an hour on two cores
  granet plasticity resnet20-paper                          the paper's grid, for a GPU
  granet plasticity runs/digits-granet-3f9a1c               the checkpoints of a run"""


@dataclass(frozen=True)
class Options:
    """What is pruned, when, by how much; what is left out is taken from the study."""

    at: tuple[str, ...] = ()
    """Moments of pruning: epochs, or '1000it', or '50%' of the training."""
    prune: tuple[float, ...] = ()
    """Pruning rates: shares of the weights that are active then."""
    regenerate: tuple[str, ...] = ()
    """Arms: none; restore (as many regenerated as pruned); equal (regenerated at the density of none)."""
    scope: Literal["global", "layerwise"] | None = None
    """Where weights compete to stay."""
    retrain: str | None = None
    """Training at the frozen learning rate: epochs, or '1000it', or '50%'."""
    pretrained_sparsity: tuple[float, ...] = ()
    """Sparsities of the networks that are pruned (static, uniform)."""
    seeds: tuple[int, ...] = ()
    """Seeds; several give bands."""
    batches: int | None = None
    """Batches that the gradient for regeneration is averaged over."""
    exchange: float | None = None
    """Share of the weights left that the arm 'equal' gives up for regenerated ones."""
    out: Path | None = None
    """Folder of networks, cells, figures; plasticity/NAME if not given."""
    jobs: int | None = None
    """Processes; else one a processor, one on a GPU."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Where they run."""
    option: dict[str, str] = field(default_factory=dict)
    """Options of the executor, such as num_gpus 1 for ray."""

    def over(self, study: studies.Study) -> studies.Study:
        """Returns the study with what is given here in place of its own."""
        names = [one.name for one in dataclasses.fields(study)]
        return dataclasses.replace(study, **{name: x for name in names if (x := getattr(self, name)) not in (None, ())})


def main(args: list[str]) -> int:
    """Makes the study, shows the table, writes figures and findings; returns the exit code, 1 if cells failed."""
    rest = list(args)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else studies.DEFAULT
    if studies.is_run(name):
        what, default = Path(name), studies.Study()
        options = words.read(Options, rest, prog="granet plasticity", description=DESCRIPTION)
    else:
        source, default = studies.resolve(name)
        request = parse([source, *rest], Options, prog="granet plasticity", description=DESCRIPTION, method="dense")
        what, options = request.recipe, request.options
    study = options.over(default)
    out = options.out
    if out is None and not isinstance(what, Path):
        out = Path("plasticity") / Path(name).stem

    import yaml

    from granet.cli.progress import stoppable
    from granet.cli.terminal import Console
    from granet.lab import pool
    from granet.lab.plasticity import run as lab
    from granet.report import page as report

    report.require()
    pool.check(options.executor, options.jobs, options.option)

    console = Console()
    plan = lab.plan(what, study, out=out)
    failed = []
    there = {key: yaml.safe_load(value) for key, value in options.option.items()}
    with stoppable() as stop:
        for ended in lab.make(plan, jobs=options.jobs, executor=options.executor, options=there, stop=stop):
            said = "" if ended.result is None else f"  plasticity {100 * ended.result['plasticity']:+.2f}"
            if ended.error is not None:
                failed.append(ended)
                said = f"  failed: {ended.error.splitlines()[-1]}"
            line = f"{ended.done:{len(str(ended.of))}}/{ended.of}  {ended.what}{said}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        stopped = stop()
    table = plan.table()
    if table.rows:
        from granet.lab.plasticity.findings import findings, paragraph
        from granet.lab.plasticity.page import write

        say(f"\n{table}\n\n{paragraph(table)}\n")
        for finding in findings(table):
            say(f"- {finding.claim}: {finding.verdict}. {finding.figures}")
        for what, path in write(table, plan.out).items():
            console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)
    for ended in failed[:3]:
        say(f"\n{ended.what} failed:\n" + "\n".join(ended.error.splitlines()[-5:]))
    if stopped:
        say(f"stopped with {table.missing} cells to go; the same command goes on")
        return 130
    return 1 if failed else 0
