"""A sweep: every cell a run directory, so that what is finished is not done again and what was stopped goes on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from granet.lab import pool
from granet.lab.sweep import grid
from granet.lab.sweep.grid import Cell, SweepError
from granet.train import checkpoint, data, models
from granet.train.recipe import validate
from granet.train.run import Run, execute


def run_cell(recipe: str, runs: str) -> dict[str, Any] | None:
    """Trains a recipe, given as YAML, in the folder ``runs``; returns its summary, None if it was asked to stop.

    The whole job of an executor: plain data in, plain data out, the rest in the run directory.
    """
    run = Run.for_recipe(validate(yaml.safe_load(recipe), source="of the sweep"), Path(runs))
    threads = torch.get_num_threads()
    try:
        return execute(run, stop=pool.stopping)
    finally:
        torch.set_num_threads(threads)  # the recipe's own number is not for the next job


@dataclass(frozen=True)
class Done:
    """A cell with how it ended: with a summary, with an error, or, stopped, with neither."""

    cell: Cell
    run: Run
    summary: Mapping[str, Any] | None = None
    error: str | None = None


def planned(cells: list[Cell], runs: Path) -> list[Done]:
    """Returns the cells with their run directories, and the summaries of those that are finished.

    Raises:
        RecipeError: a directory holds a run of another recipe.
        SweepError: two cells are one and the same run.
    """
    found: dict[Path, Done] = {}
    for cell in cells:
        run = Run.for_recipe(cell.recipe, runs)
        if run.path in found:
            raise SweepError(
                f"{found[run.path].cell.label!r} and {cell.label!r} are the same run, {run.path.name}: "
                "take one away, or change a setting"
            )
        found[run.path] = Done(cell, run, run.summary)
    return list(found.values())


def check(cells: list[Cell]) -> None:
    """Raises SweepError unless all cells can be trained here: the data are there, and every method fits its network.

    Raises:
        SweepError: which cells cannot, and why.
        FileNotFoundError: a dataset is not on this machine; the message says where to get it.
    """
    sizes: dict[tuple, int] = {}
    networks: dict[tuple, torch.nn.Module] = {}
    problems = []
    first = cells[0].recipe.seed
    for cell in cells:
        recipe = cell.recipe
        if recipe.seed != first:  # the others differ in nothing else
            continue
        where = (recipe.data.name, recipe.data.root, recipe.data.validation)
        if where not in sizes:
            sizes[where] = len(data.load(where[0], root=where[1], validation=where[2]).train)
        source = data.DATASETS[recipe.data.name]
        what = (recipe.model.name, source.classes, source.shape[0])
        if what not in networks:
            networks[what] = models.build(what[0], classes=what[1], in_channels=what[2])
        try:
            steps = data.steps_per_epoch(
                sizes[where], recipe.train.batch_size, drop_last=not recipe.train.partial_batch
            )
            if not steps:
                raise ValueError(f"batch_size {recipe.train.batch_size} is larger than the training set")
            recipe.plan(networks[what], steps)
        except ValueError as error:
            settings = {key: cell.at(key) for key in ("method.sparsity", "train.epochs", "train.batch_size")}
            problems.append(f"{grid.place(cell.task, cell.label, settings)}: {error}")
    grid.refuse(problems)


def run(
    todo: list[Done],
    *,
    executor: str = "local",
    jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Done]:
    """Yields each cell of ``todo`` as its run ends; what a failed one said last is kept in its ``error.txt``.

    Args:
        todo: of `planned`; finished ones come back as they are, first.
        executor: as `pool.map`, like ``jobs`` and ``options``; None for ``jobs`` is one at a time on a GPU.
        stop: once True, nothing more is started, and what runs saves a checkpoint and ends.
    """
    yield from (done for done in todo if done.summary is not None)
    by_argument = {_argument(done.run): done for done in todo if done.summary is None}
    if jobs is None and executor == "local" and torch.cuda.is_available():
        jobs = 1
    asked = False

    def stopped() -> bool:
        nonlocal asked
        asked = asked or stop()
        return asked

    for outcome in pool.map(run_cell, by_argument, executor=executor, jobs=jobs, options=options, stop=stopped):
        done = by_argument[outcome.argument]
        note = done.run.path / "error.txt"
        if outcome.error is not None and not asked:  # a job that was called off has not failed
            done.run.path.mkdir(parents=True, exist_ok=True)
            checkpoint.replace(note, f"{outcome.error}\n")
            yield Done(done.cell, done.run, error=outcome.error)
            continue
        note.unlink(missing_ok=True)
        yield Done(done.cell, done.run, outcome.value)


def _argument(run: Run) -> tuple[str, str]:
    return run.recipe.to_yaml(), str(run.path.parent)
