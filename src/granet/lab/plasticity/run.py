"""The study as a whole: networks are trained, their checkpoints pruned, every cell kept as it is made."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from granet import files
from granet.lab import pool
from granet.lab.plasticity import study as studies
from granet.lab.plasticity.cell import read, run_cell
from granet.lab.plasticity.study import Cell, Study, StudyError
from granet.lab.plasticity.table import Table, table
from granet.lab.sweep import grid
from granet.lab.sweep import run as sweep
from granet.train import checkpoint, data
from granet.train.recipe import Recipe
from granet.train.run import Run


@dataclass(frozen=True)
class Plan:
    """A study made concrete: the networks to train, or the one that is there, and where everything goes.

    Attributes:
        study: the grid.
        recipe: what is trained; of the run, where one is given.
        run: the run that was given instead of a recipe.
        out: the folder of all that is written.
        steps: the moments of pruning.
        retrain: k, in steps.
        steps_per_epoch: optimizer steps in an epoch.
        tested: number of test images that accuracies are measured on.
    """

    study: Study
    recipe: Recipe
    run: Run | None
    out: Path
    steps: tuple[int, ...]
    retrain: int
    steps_per_epoch: int
    tested: int

    @property
    def pretraining(self) -> list[sweep.Done]:
        """The runs that leave the checkpoints, with the summaries of those that are finished."""
        if self.run is not None:
            return [sweep.Done(grid.Cell(self.recipe.name, "given", self.recipe), self.run, self.run.summary)]
        trained = studies.pretraining(self.study, self.recipe, self.steps)
        return sweep.planned(
            [grid.Cell(self.recipe.name, one.name, one) for one in trained], files.within(self.out, "runs")
        )

    @property
    def cells(self) -> list[Cell]:
        """All cells of the study."""
        paths = [done.run.path for done in self.pretraining]
        return [cell for path in paths for cell in studies.cells(self.study, path, self.steps, self.retrain)]

    def table(self) -> Table:
        """Returns the table of the cells that are made."""
        recipes = {str(done.run.path): done.run.recipe for done in self.pretraining}
        results = [read(cell.file(files.within(self.out, "cells"), recipes[cell.run])) for cell in self.cells]
        settings = self.recipe.train.resolved(steps_per_epoch=self.steps_per_epoch, epochs=self.recipe.train.epochs)
        drops = settings["milestones"] if settings["schedule"] == "multistep" else ()
        return table(
            studies.title(self.recipe) if self.run is None else self.run.path.name,
            [result for result in results if result is not None],
            epochs=self.recipe.train.epochs,
            drops=tuple(step / self.steps_per_epoch for step in drops),
            retrain=self.retrain / self.steps_per_epoch,
            tested=self.tested,
            missing=results.count(None),
        )


def plan(what: str | Path | Recipe, study: Study | None = None, *, out: Path | None = None) -> Plan:
    """Returns the study of ``what``: a recipe, the name of one or of a study of the package, or a run directory.

    Args:
        what: see above. Of a run its own checkpoints are pruned, at the moments at which it has any.
        study: the grid; by default that of the study's name.
        out: where everything is written; ``plasticity/NAME``, or the folder ``plasticity`` in the run.

    Raises:
        StudyError: moments outside the training, or a run that is not finished or lacks the checkpoints.
        RecipeError: there is no such recipe.
        FileNotFoundError: the data are not on this machine.
    """
    run = None
    if isinstance(what, Recipe):
        name, recipe = what.name, what
    elif studies.is_run(what):
        run = Run.open(Path(what))
        name, recipe = run.path.name, run.recipe
    else:
        source, default = studies.resolve(str(what))
        study = study or default
        name, recipe = Path(what).stem if str(what).endswith((".yaml", ".yml")) else what, studies.load_recipe(source)
    study = study or Study()
    values = recipe.data
    dataset = data.load(values.name, root=values.root, validation=values.validation, seed=recipe.seed)
    per_epoch = data.steps_per_epoch(
        len(dataset.train), recipe.train.batch_size, drop_last=not recipe.train.partial_batch
    )
    if not per_epoch:
        raise StudyError(f"batch_size {recipe.train.batch_size} is larger than the training set")
    steps = _moments_of(run, study, per_epoch) if run else studies.moments(study, recipe, per_epoch)
    place = out or (files.within(run.path, "plasticity") if run else Path("plasticity") / name)
    retrain = studies.retraining(study, recipe, per_epoch)
    tested = min(len(dataset.test), recipe.train.evaluate_images or len(dataset.test))
    return Plan(study, recipe, run, place, steps, retrain, per_epoch, tested)


def _moments_of(run: Run, study: Study, steps_per_epoch: int) -> tuple[int, ...]:
    """Returns the moments of the study of which a run has checkpoints; all it has, if the study names none itself.

    Raises:
        StudyError: it is not finished, or has no checkpoint at a moment.
    """
    there = sorted(int(path.name) for path in checkpoint.paths(run.checkpoints))
    if run.summary is None:
        raise StudyError(
            f"{run.path} is not finished: `granet resume {run.path}` first, the gap is to its final accuracy"
        )
    if not there:
        raise StudyError(f"{run.path} has no checkpoints, so there is nothing to prune; study its recipe instead")
    if study.at == Study.at:
        return tuple(there)
    wanted = studies.moments(study, run.recipe, steps_per_epoch)
    missing = [step for step in wanted if step not in there]
    if missing:
        raise StudyError(
            f"{run.path} has no checkpoint at step {', '.join(map(str, missing))}; it has "
            f"{', '.join(map(str, there))}. Leave out --at to take these, or "
            "train with --train.keep, such as --train.keep 10ep 20ep"
        )
    return wanted


@dataclass(frozen=True)
class Progress:
    """What just ended: a network's training, or a cell; ``error`` is what it said last if it failed."""

    what: str
    done: int
    of: int
    error: str | None = None
    result: dict[str, Any] | None = None


def make(
    plan: Plan,
    *,
    jobs: int | None = None,
    executor: str = "local",
    options: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Yields what ends while the study is made; what was made before is not made again.

    Args:
        plan: of `plan`.
        jobs: how many processes; see `granet.lab.pool.map`, also for ``executor`` and ``options``.
        executor: where they run.
        options: of the executor.
        stop: once True, nothing more starts, and what runs ends without its cell.
    """
    there = {"executor": executor, "jobs": jobs, "options": options, "stop": stop}
    trained = plan.pretraining
    for number, done in enumerate(sweep.run(trained, **there), 1):
        if done.summary or done.error:
            yield Progress(f"trained {done.run.path.name}", number, len(trained), done.error)
    finished = {str(done.run.path): done.run.recipe for done in plan.pretraining if done.summary is not None}
    cells = plan.cells
    todo = [
        cell
        for cell in cells
        if cell.run in finished and not cell.file(files.within(plan.out, "cells"), finished[cell.run]).exists()
    ]
    count = len(cells) - len(todo)
    if jobs is None and executor == "local" and torch.cuda.is_available():
        there["jobs"] = 1
    by_argument = [(asdict(cell), str(files.within(plan.out, "cells"))) for cell in todo]
    for outcome in pool.map(run_cell, by_argument, **there):
        cell = Cell(**outcome.argument[0])
        if outcome.value is None and outcome.error is None:
            continue
        if outcome.error is not None and stop():
            continue  # a job that was called off has not failed
        count += 1
        name = f"{Path(cell.run).name}  step {cell.step}  rate {cell.rate:g}  {cell.arm}"
        yield Progress(name, count, len(cells), outcome.error, outcome.value)


def pruning_plasticity(
    what: str | Path | Recipe = studies.DEFAULT,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    executor: str = "local",
    **changes: Any,
) -> Table:
    """Returns the table of a study of pruning plasticity, made now as far as it was not made before.

    Args:
        what: a recipe or its name, a study of the package such as ``"resnet20-paper"``, or a run directory.
        out: where everything is written; ``plasticity/NAME`` if not given.
        jobs: how many processes; one a processor if not given.
        executor: where they run; see `granet.lab.pool.map`.
        **changes: fields of `Study` that differ from those of the study.

    Raises:
        StudyError: the study is impossible.
        RuntimeError: a network or a cell failed; the others are made and kept.
    """
    default = studies.resolve(str(what))[1] if not isinstance(what, Recipe) else Study()
    made = plan(what, dataclasses.replace(default, **changes), out=None if out is None else Path(out))
    failed = [ended for ended in make(made, jobs=jobs, executor=executor) if ended.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} jobs failed; the first, {failed[0].what}, said last:\n{failed[0].error}")
    return made.table()
