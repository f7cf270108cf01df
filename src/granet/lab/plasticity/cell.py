"""One cell of the study: prune a checkpoint once, regenerate or not, train on, and measure."""

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from granet import files, topology
from granet.criterion import Layer, magnitude
from granet.distribution import budget
from granet.lab import pool
from granet.lab.plasticity.study import Cell
from granet.methods import METHODS
from granet.parsing import from_json
from granet.sparsifier import masking
from granet.train import checkpoint, optimizer
from granet.train.checkpoint import Checkpoint
from granet.train.recipe import SECTIONS, RecipeError
from granet.train.run import Run
from granet.train.trainer import Trainer

Masks = Mapping[str, Tensor]


def prune(masks: Masks, weights: Mapping[str, Tensor], rate: float, scope: str) -> dict[str, Tensor]:
    """Returns the masks without a share ``rate`` of the active weights, the smallest; no layer loses all.

    Args:
        masks: the active weights.
        weights: of the same names.
        rate: share of the active weights, of the network or of each layer.
        scope: ``global`` or ``layerwise``.
    """
    layers = {name: Layer(weights[name]) for name in masks}
    counts = {name: topology.count(mask) for name, mask in masks.items()}
    if scope == "global":
        left = max(len(masks), budget(sum(counts.values()), 1 - rate))
        return topology.prune_to(masks, left, layers, magnitude)
    return topology.prune_each(masks, {x: max(1, budget(n, 1 - rate)) for x, n in counts.items()}, layers, magnitude)


def exchanged(masks: Masks, weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Returns the masks without a further share of every layer's active weights, the smallest, rounded down."""
    return {
        name: topology.drop(mask, weights[name].abs(), int(share * topology.count(mask)))
        for name, mask in masks.items()
    }


def regenerate(kept: Masks, like: Masks, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the masks ``kept`` with weights grown to the number that ``like`` has in every layer, by |gradient|.

    Those just pruned may grow again.
    """
    return {
        name: topology.grow(mask, gradients[name].abs(), topology.count(like[name]) - topology.count(mask))
        for name, mask in kept.items()
    }


class Bench:
    """A run's network, which is put back to a checkpoint, pruned and trained on, once for each cell."""

    def __init__(self, run: Run):
        self.run = run
        recipe, name = run.recipe, run.recipe.method.name
        if METHODS[name].reparameterizes:
            raise RecipeError(f"{run.path} trains more than its weights ({name}): take a run of another method")
        plain = recipe.model.model_copy(update={"pattern": "unstructured"})  # single weights are pruned
        dense = recipe.model_copy(update={"method": SECTIONS["dense"](name="dense"), "model": plain})
        self.trainer = Trainer(dense, begins=False)
        self._before: dict[int, float] = {}

    def checkpoint(self, step: int) -> Checkpoint:
        """Returns the run's checkpoint of ``step``.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return checkpoint.load(self.run.checkpoints / f"{step:08d}")

    def place(self, found: Checkpoint, masks: Masks, kept: Masks | None = None) -> None:
        """Puts the network where the checkpoint was taken, with these masks from now on.

        Args:
            found: the checkpoint.
            masks: the active weights.
            kept: those of them that keep their values and the optimizer's memory; the others start at zero.
        """
        # what the run left dense, because it was asked to or a pattern does not fit, has no mask and stays so
        self.trainer.restart(found, masks, kept=kept)

    def train(self, until: int, lr: float | None = None) -> bool:
        """Trains to the step ``until``, with a constant ``lr`` if given; returns False if the pool stopped it first.

        Raises:
            TrainingError: the loss is not finite.
        """
        trainer = self.trainer

        def after_step() -> bool:
            if trainer.step % trainer.steps_per_epoch == 0 or trainer.step == until:
                trainer.refuse_non_finite()
            return pool.stopping()

        return trainer.train_until(until, lr=lr, after_step=after_step)

    def lr(self, step: int) -> float:
        """Returns the learning rate of the step after ``step``; after the last one, that of the last."""
        return optimizer.learning_rate(self.trainer.settings, min(step, self.trainer.steps - 1), self.trainer.steps)

    def accuracy(self) -> float:
        """Returns the test accuracy of the network as it is."""
        return self.trainer.evaluate("test").accuracy

    def before(self, found: Checkpoint) -> float:
        """Returns the test accuracy at the checkpoint, nothing pruned; measured once."""
        if found.step not in self._before:
            self.place(found, found.masks)
            self._before[found.step] = self.accuracy()
        return self._before[found.step]


@functools.lru_cache(maxsize=1)  # the cells of a run come one after the other: its data are read once
def bench(path: str) -> Bench:
    """Returns the bench of the run directory ``path``."""
    return Bench(Run.open(Path(path)))


def run_cell(cell: dict[str, Any], folder: str) -> dict[str, Any] | None:
    """Returns the result of a cell, from its file in ``folder`` if it was made before; None if it was asked to stop.

    Raises:
        CheckpointError: its checkpoint is missing or damaged.
        TrainingError: the loss is not finite.
    """
    pruning = Cell(**cell)
    file = pruning.file(Path(folder), Run.open(Path(pruning.run)).recipe)
    if (result := read(file)) is not None:
        return result
    threads = torch.get_num_threads()
    try:
        result = measure(bench(pruning.run), pruning)
    finally:
        torch.set_num_threads(threads)
    if result is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.replace(file, json.dumps(result, indent=1))
    return result


RESULT = (
    "pretrained_sparsity", "seed", "step", "epoch", "lr", "rate", "density_before", "density", "accuracy_before",
    "accuracy_retrained", "plasticity", "accuracy_unpruned", "accuracy_final", "final_gap", "seconds",
)  # fmt: skip


def read(file: Path) -> dict[str, Any] | None:
    """Returns a cell's result; None if there is none."""
    try:
        result = from_json(files.read(file))
    except (FileNotFoundError, ValueError):  # written at once or not at all: a damaged one is made again
        return None
    kinds = dict.fromkeys(RESULT, (int, float)) | dict.fromkeys(("arm", "scope"), str)
    sound = isinstance(result, dict) and all(isinstance(result.get(key), kind) for key, kind in kinds.items())
    return result if sound else None


def measure(on: Bench, cell: Cell) -> dict[str, Any] | None:
    """Returns what a cell came to: both measures, with all that they are computed from; None if asked to stop."""
    began = time.perf_counter()
    found = on.checkpoint(cell.step)
    accuracy_before = on.before(found)
    before, kept, masks = choose(on, found, cell)
    lr, end, frozen = on.lr(cell.step), on.trainer.steps, cell.step + cell.retrain

    def train(until: int, *, anew: bool, freeze: bool) -> float | None:
        if anew:
            on.place(found, masks, kept)
        return on.accuracy() if on.train(until, lr if freeze else None) else None

    if any(on.lr(step) != lr for step in range(cell.step, min(frozen, end))):
        final = train(end, anew=True, freeze=False)
        retrained = None if final is None else train(frozen, anew=True, freeze=True)
    elif frozen <= end:  # until then both measures lie on one path of training
        retrained = train(frozen, anew=True, freeze=False)
        final = None if retrained is None else train(end, anew=False, freeze=False)
    else:
        final = train(end, anew=True, freeze=False)
        retrained = None if final is None else train(frozen, anew=False, freeze=True)
    if final is None or retrained is None:
        return None
    unpruned = on.run.summary["last"]["test_accuracy"]
    total = on.trainer.sparsifier.total
    return {
        "pretrained_sparsity": getattr(on.run.recipe.method, "sparsity", None) or 0.0,
        "seed": on.run.recipe.seed,
        "step": cell.step,
        "epoch": cell.step / on.trainer.steps_per_epoch,
        "lr": lr,
        "rate": cell.rate,
        "arm": cell.arm,
        "scope": cell.scope,
        "density_before": sum(map(topology.count, before.values())) / total,
        "density": sum(map(topology.count, masks.values())) / total,
        "accuracy_before": accuracy_before,
        "accuracy_retrained": retrained,
        "plasticity": retrained - accuracy_before,
        "accuracy_unpruned": unpruned,
        "accuracy_final": final,
        "final_gap": final - unpruned,
        "seconds": time.perf_counter() - began,
    }


def choose(on: Bench, found: Checkpoint, cell: Cell) -> tuple[Masks, Masks, Masks]:
    """Returns the masks of a cell: before the pruning, of the weights that keep their values, and afterwards."""
    before = found.masks
    on.place(found, before)
    weights = {name: p.detach() for name, p in on.trainer.model.named_parameters() if name in before}
    before = {name: masking.like(mask, weights[name]) for name, mask in before.items()}
    pruned = prune(before, weights, cell.rate, cell.scope)
    if cell.arm == "none":
        return before, pruned, pruned
    gradients = on.trainer.probe(cell.batches).gradients(before)
    kept = exchanged(pruned, weights, cell.exchange) if cell.arm == "equal" else pruned
    return before, kept, regenerate(kept, pruned if cell.arm == "equal" else before, gradients)
