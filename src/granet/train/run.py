"""Run directories: one training run, all that went in and all that came out.

```
runs/digits-granet-3f9a1c/
    recipe.yaml          the recipe, every default written out
    environment.json     versions, git hash, device, threads
    metrics.jsonl        one JSON object a line: train, eval and update records
    checkpoints/         the last two, the best, and those of train.keep
    tensorboard/         the same curves as events
    engine.txt           with the sparse engine: what was measured and chosen for each layer
    summary.json         results, FLOPs, layers; there once the run is finished
    report.html          curves, layers and the table
```
"""

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from granet import __version__, files, ranks
from granet.parsing import from_yaml
from granet.text import short
from granet.train import checkpoint, data, initial
from granet.train.recipe import Recipe, RecipeError, validate
from granet.train.summary import read_summary
from granet.train.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run directory: that of a recipe (`for_recipe`), or one that is there already (`open`)."""

    path: Path
    recipe: Recipe

    @staticmethod
    def for_recipe(recipe: Recipe, runs: Path) -> "Run":
        """Returns the run of `recipe` in the folder `runs`, begun or not; its directory is made by `execute`.

        It is named after the recipe and a hash of all settings that are not default, so the same command finds the
        same run.

        Raises:
            RecipeError: the directory holds a run of another recipe.
        """
        run = Run(runs / f"{recipe.name}-{recipe.digest()}", recipe)
        if files.there(run.path / "recipe.yaml"):
            where = {"data": {"root"}}  # data may have moved
            if Run.open(run.path).recipe.model_dump(exclude=where) != recipe.model_dump(exclude=where):
                raise RecipeError(f"{run.path} holds a run of another recipe; give another --runs folder or --name")
        return run

    @staticmethod
    def open(path: Path) -> "Run":
        """Returns the run in the directory `path`.

        Raises:
            FileNotFoundError: it is not a run directory.
        """
        path = path.resolve() if not path.name else path  # the directory one stands in has a name too
        file = path / "recipe.yaml"
        try:
            values = from_yaml(files.read(file))
        except (FileNotFoundError, NotADirectoryError):
            folder = path if path.is_dir() and any(path.glob("*/recipe.yaml")) else path.parent
            there = sorted(p.parent.name for p in folder.glob("*/recipe.yaml"))
            hint = f"; runs in {folder}: {', '.join(there)}" if there else ""
            raise FileNotFoundError(f"{path} is not a run directory: it has no recipe.yaml{hint}") from None
        except ValueError as error:
            raise RecipeError(f"{file} is damaged: {error}") from None
        return Run(path, validate(values, source=str(file)))

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints.

        Raises:
            FileError: it is a link.
        """
        return files.within(self.path, "checkpoints")

    @property
    def summary(self) -> dict[str, Any] | None:
        """The results of a finished run, or None.

        Raises:
            RecipeError: the file is damaged.
        """
        try:
            return read_summary(self.path / "summary.json")
        except ValueError as error:
            raise RecipeError(f"{error}: remove the file, and granet resume writes it anew") from None

    @property
    def report(self) -> Path:
        """Where the report is, or will be."""
        return self.path / "report.html"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the run for this process; the lock is released when the process ends, however it ends.

        Raises:
            RecipeError: another process trains it.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.path / ".lock", wait=False))
            except BlockingIOError:
                raise RecipeError(f"{self.path} is being trained by another process") from None
            yield


class Metrics:
    """The file of records: one JSON object a line, cut back to a checkpoint on resume."""

    def __init__(self, path: Path, offset: int):
        self._path, self._file = path, files.appending(path)
        if offset > self._file.tell():
            logger.warning("%s is shorter than at the checkpoint: its records up to there are lost", path)
        self._file.truncate(min(offset, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error.strerror}; make room and resume") from error

    def sync(self) -> int:
        """Waits until all records are on the disk; returns the length of the file."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def execute(
    run: Run,
    *,
    watch: Callable[[Trainer, dict[str, Any]], None] = lambda trainer, record: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains `run` to the end from where it stands; returns its summary, or None if `stop` ended it early.

    A finished run is not trained again: its summary comes back at once. Of several ranks (`granet.ranks`) all call
    this. Only the first reads and writes the run's files and calls `watch`; it tells the others what it found. Where
    one of them fails, the others fail with its message.

    Args:
        run: the run.
        watch: called with the trainer and every record, to show progress.
        stop: called after every step; True saves a checkpoint and ends the training.

    Raises:
        CheckpointError: no checkpoint could be written, or none read.
        TrainingError: the loss is not finite.
        RankError: another rank failed; the message is that of its error.
    """
    here = ranks.current()
    with here.together():
        here.same("the run (its directory's name tells recipes apart)", run.path.name)
        finished = here.decide(lambda: run.summary)
        return _train(run, here, watch, stop) if finished is None else finished


def _train(run: Run, here: ranks.Ranks, watch, stop: Callable[[], bool]) -> dict[str, Any] | None:
    begins = here.decide(lambda: not checkpoint.paths(run.checkpoints))
    trainer = Trainer(run.recipe, begins=begins)  # first: what cannot be built leaves no directory
    with contextlib.ExitStack() as held:  # by the first rank: the lock and the open files
        metrics = events = None

        def begin() -> checkpoint.Checkpoint | None:
            run.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(run.locked())
            checkpoint.replace(run.path / "recipe.yaml", run.recipe.to_yaml())
            return checkpoint.load_latest(run.checkpoints)

        def open_files() -> None:
            nonlocal metrics, events
            checkpoint.replace(run.path / "environment.json", json.dumps(environment(trainer), indent=1))
            metrics = held.enter_context(contextlib.closing(Metrics(run.path / "metrics.jsonl", offset)))
            events = held.enter_context(contextlib.closing(_events(run.path, trainer.step)))

        def record(values: dict[str, Any]) -> None:
            def write() -> None:
                metrics.write(values)
                events.write(values)
                watch(trainer, values)

            here.decide(write)

        def save() -> None:
            here.decide(lambda: _save(run, trainer, metrics.sync()))

        def finish() -> dict[str, Any]:
            if trainer.engine is not None:
                checkpoint.replace(run.path / "engine.txt", f"{trainer.engine.report()}\n")
            checkpoint.replace(run.path / "summary.json", json.dumps(summary, indent=1))
            return summary

        offset = 0
        found = here.decide(begin)
        if found is not None:
            _restore(trainer, found)
            offset = found.metrics
            logger.info("going on from step %d of %d", trainer.step, trainer.end)
        here.decide(open_files)
        if not trainer.fit(record=record, save=save, stop=stop):
            return None
        summary = _summarise(run, trainer)
        return here.decide(finish)


def _save(run: Run, trainer: Trainer, offset: int) -> None:
    state = trainer.state_dict() | {"metrics": offset}
    model, compress = trainer.sparsifier.plain_state_dict(), trainer.settings.compress
    checkpoint.save(run.checkpoints, step=trainer.step, model=model, state=state, compress=compress)
    best = {trainer.best.step} if trainer.best else set()
    checkpoint.prune(run.checkpoints, keep=2, also=best | set(trainer.settings.keep))


def _restore(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    """Puts a checkpoint into the trainer.

    Raises:
        CheckpointError: it does not fit the recipe, or is not what a trainer has saved.
    """
    with checkpoint.distrusted(found.path):
        trainer.load_state_dict(found.model, found.state)
        if trainer.step != found.step or not 0 <= found.step <= trainer.steps:
            raise ValueError(f"its content is of step {trainer.step} of {trainer.steps}, its name of step {found.step}")
        numbers = [trainer.training_flops, trainer.seconds, *(asdict(trainer.best).values() if trainer.best else ())]
        if not all(isinstance(number, int | float) for number in numbers) or not 0 <= sum(numbers[:2]) < math.inf:
            raise ValueError(f"its costs and its best score must be numbers, not {short(numbers)}")


def _summarise(run: Run, trainer: Trainer) -> dict[str, Any]:
    """Returns the summary: what the run is and cost, and the test accuracy of its last and its best network."""
    summary = trainer.summary() | {"name": run.path.name}
    summary["last"] = _score(trainer, trainer.evaluate("validation").accuracy)
    summary["best"] = None
    if trainer.best is not None:
        best, step = trainer.best, trainer.step
        if best.step != step:
            load_weights(run, trainer, "best")
        summary["best"] = _score(trainer, best.accuracy)
    return summary


def _score(trainer: Trainer, validation_accuracy: float) -> dict[str, Any]:
    """Returns what the summary says of the network that the trainer holds."""
    test = trainer.evaluate("test")
    return {
        "step": trainer.step,
        "validation_accuracy": validation_accuracy,
        "test_accuracy": test.accuracy,
        "test_accuracy_per_class": list(test.per_class),
    }


def load_weights(run: Run, trainer: Trainer, which: str | None = None) -> int:
    """Returns the step of a checkpoint, which is put into `trainer`; `which` is that of `checkpoint.pick`.

    All ranks of `trainer` call this together: the first one reads, and tells the others.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    found = trainer.ranks.decide(lambda: checkpoint.pick(run.checkpoints, which))
    _restore(trainer, found)
    return found.step


def extend(run: Run, epochs: int) -> Path:
    """Returns the directory of the run that goes on from `run` up to `epochs`, made if it is not there yet.

    It lies beside `run`, which stays as it is, and holds its records and its last and best checkpoint.

    Raises:
        RecipeError: the training is so long already.
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    recipe, here = run.recipe, ranks.current()
    images = data.load(
        recipe.data.name, root=recipe.data.root, validation=recipe.data.validation, seed=recipe.seed
    ).train
    share = here.share(recipe.train.batch_size, recipe.train.accumulate)
    drop_last = not recipe.train.partial_batch
    steps_per_epoch = data.steps_per_epoch(len(images), share, world=here.world, drop_last=drop_last)
    made = Run.for_recipe(initial.longer(recipe, epochs, steps_per_epoch), run.path.parent)
    if checkpoint.paths(made.checkpoints):
        return made.path
    last, best = checkpoint.pick(run.checkpoints, "last"), checkpoint.pick(run.checkpoints)
    made.path.mkdir(parents=True, exist_ok=True)
    with made.locked():
        checkpoint.replace(made.path / "recipe.yaml", made.recipe.to_yaml())
        records = (run.path / "metrics.jsonl").read_bytes()[: last.metrics]
        checkpoint.replace(made.path / "metrics.jsonl", records.decode())
        for found in (best, last):
            parts = {"model": found.model, "state": found.state, "compress": recipe.train.compress}
            checkpoint.save(made.checkpoints, step=found.step, **parts)
    return made.path


def environment(trainer: Trainer) -> dict[str, Any]:
    """Returns what the results may depend on besides the recipe: versions, device, threads, ranks, the command."""
    import numpy

    device = trainer.device
    return {
        "granet": __version__,
        "git": _git_hash(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "ranks": trainer.ranks.world,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _git_hash() -> str | None:
    """Returns the commit of granet's own sources, with `+` if they were changed since; None if not in git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


class _NoEvents:
    def write(self, record: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _Events:
    """The numbers of the records as TensorBoard events."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, float) and key not in ("epoch", "seconds"):
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])
            elif key in ("active", "grown", "dropped"):
                for name, count in value.items():
                    self._writer.add_scalar(f"{key}/{name}", count, record["step"])

    def close(self) -> None:
        self._writer.close()


def _events(run: Path, step: int) -> _Events | _NoEvents:
    try:
        return _Events(files.subfolder(run, "tensorboard"), step)
    except ModuleNotFoundError:
        logger.info('no TensorBoard events: pip install "granet[train]"')
        return _NoEvents()
