"""Procedures that train several times: lottery tickets by iterative magnitude pruning, and one-shot pruning.

Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Frankle et al., "Linear Mode Connectivity and the Lottery
Ticket Hypothesis", ICML 2020 (rewinding to an early step); Renda et al., "Comparing Rewinding and Fine-tuning in Neural
Network Pruning", ICLR 2020 (learning-rate rewinding).

A level is a run like any other, in a directory of its own: its first checkpoint is the network of the level before,
pruned and rewound. So a stopped procedure goes on where it was, and every level can be evaluated, compared, exported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from granet import distribution, ranks, topology
from granet.criterion import Layer, magnitude
from granet.lab.plasticity.study import epochs, title
from granet.train import checkpoint
from granet.train.recipe import Recipe, in_steps, validate
from granet.train.run import Run, execute
from granet.train.trainer import Trainer

MODES = ("weights", "learning-rate")


class LotteryError(ValueError):
    """A procedure that cannot be run; the message says what was given and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Lottery:
    """A procedure: how many pruning rounds, to which sparsity, and what each round goes back to.

    Attributes:
        sparsity: share of inactive weights after the last level; every level prunes the same share of what is left.
        levels: number of pruning rounds; 10 rounds to 90 % prune about 20 % each, a single one is one-shot pruning.
        rewind: the moment to which a level goes back, in epochs (``2``), ``"500it"`` or ``"75%"`` of the training.
        mode: what is reset. ``weights``: weights, optimizer and learning rate, to that moment of level 0;
            ``learning-rate``: the learning rate alone, while the trained weights stay.
        scope: where weights compete: in all layers together, or layerwise.

    Raises:
        LotteryError: a value is impossible.
    """

    sparsity: float
    levels: int = 10
    rewind: str = "0"
    mode: Literal["weights", "learning-rate"] = "weights"
    scope: Literal["global", "layerwise"] = "global"

    def __post_init__(self):
        if not 0 < self.sparsity < 1:
            raise LotteryError(
                f"sparsity={self.sparsity} must be above 0 and below 1: it is the share of inactive weights"
            )
        if self.levels < 1:
            raise LotteryError(f"levels={self.levels} must be at least 1")
        if self.mode not in MODES or self.scope not in ("global", "layerwise"):
            raise LotteryError(
                f"mode={self.mode!r}, scope={self.scope!r}: modes are {', '.join(MODES)}, scopes global and layerwise"
            )

    def sparsity_after(self, level: int) -> float:
        """The sparsity after so many levels.

        >>> [round(Lottery(sparsity=0.9, levels=2).sparsity_after(level), 3) for level in range(3)]
        [0.0, 0.684, 0.9]
        """
        return self.sparsity if level == self.levels else 1 - (1 - self.sparsity) ** (level / self.levels)


@dataclass(frozen=True)
class Level:
    """One level: its number, its run, and the run's summary once it is finished."""

    number: int
    run: Run
    summary: dict[str, Any] | None


def levels(recipe: Recipe, lottery: Lottery, runs: Path) -> list[Level]:
    """Returns all levels with their run directories, finished or not. Level 0 is the dense network.

    Raises:
        RecipeError: a directory holds a run of another recipe.
        LotteryError: the recipe has a pattern.
    """
    if recipe.model.pattern != "unstructured":
        raise LotteryError(f"a lottery prunes single weights, so no pattern {recipe.model.pattern!r}: leave it out")
    values: dict[str, Any] = recipe.model_dump()
    dense = values | {"method": {"name": "dense"}, "name": f"{title(recipe)}-ticket"}
    dense["train"] = values["train"] | {"keep": (epochs(lottery.rewind),)}
    found = [Run.for_recipe(validate(dense, source=recipe.name), runs)]
    kind = {"weights": "ticket", "learning-rate": "rewound"}[lottery.mode]
    for level in range(1, lottery.levels + 1):
        share = f"{100 * lottery.sparsity_after(level):.4g}"
        # all that a level depends on is in its name, which leads to its directory
        name = f"{found[0].path.name}-{kind}-{epochs(lottery.rewind)}-{lottery.scope}-{level}of{lottery.levels}-{share}"
        changed = values | {"method": {"name": "fixed"}, "name": name.replace("%", "pc")}
        found.append(Run.for_recipe(validate(changed, source=recipe.name), runs))
    return [Level(number, run, run.summary) for number, run in enumerate(found)]


def run(
    recipe: Recipe,
    lottery: Lottery,
    runs: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Trainer, dict[str, Any]], None] = lambda trainer, record: None,
    begin: Callable[[Level], None] = lambda level: None,
) -> Iterator[Level]:
    """Yields each level when it ends, finished ones at once; ends early when `stop` returns True.

    Args:
        recipe: what is trained.
        lottery: the procedure.
        runs: folder of the run directories.
        stop: as in `granet.train.run.execute`.
        watch: as in `granet.train.run.execute`.
        begin: called with each level before it is trained.

    Raises:
        LotteryError: the moment to go back to is not before the end of the training.
        CheckpointError, TrainingError: as `granet.train.run.execute`.
    """
    if ranks.current().world > 1:
        raise LotteryError("a lottery is run by one process: start it without torchrun")
    found = levels(recipe, lottery, runs)
    if found[-1].summary is None:
        rewind_step(lottery, Trainer(found[-1].run.recipe, begins=False))  # refused before the first level is trained
    for level in found:
        if level.summary is None and level.number and checkpoint.load_latest(level.run.checkpoints) is None:
            _begin(level, found, lottery)
        if level.summary is None:
            begin(level)
        summary = execute(level.run, watch=watch, stop=stop)
        if summary is None:
            return
        yield Level(level.number, level.run, summary)


def _begin(level: Level, found: list[Level], lottery: Lottery) -> None:
    """Writes the first checkpoint of a level: the network of the level before, pruned and rewound."""
    trainer = Trainer(level.run.recipe, begins=False)
    at = rewind_step(lottery, trainer)
    before = checkpoint.load_latest(found[level.number - 1].run.checkpoints)
    if before is None:
        raise checkpoint.CheckpointError(f"{found[level.number - 1].run.path} has no checkpoint to prune")
    with checkpoint.distrusted(before.path):
        state = trainer.state_dict()
        masks = _pruned(before, trainer, lottery, level.number)
        weights = before.model
        if lottery.mode == "weights":
            early = _early(found[0].run, at)
            weights, state["optimizer"] = early.model, early.state["optimizer"]
        if state["ema"] is not None:  # the average goes back with the weights, and is as sparse
            average = (early if lottery.mode == "weights" else before).state["ema"]
            state["ema"] = {name: x.where(masks[name], 0) if name in masks else x for name, x in average.items()}
        state["sparsifier"] |= {"masks": masks, "ever": masks, "step": at}
        # what it cost to come here counts
        state |= {key: before.state[key] for key in ("training_flops", "seconds")} | {"metrics": 0}
    compress = level.run.recipe.train.compress
    checkpoint.save(level.run.checkpoints, step=at, model=weights, state=state, compress=compress)


def rewind_step(lottery: Lottery, trainer: Trainer) -> int:
    """Returns the moment to go back to, in steps.

    Raises:
        LotteryError: it is not a moment before the end of the training.
    """
    try:
        step = in_steps(
            epochs(lottery.rewind), steps_per_epoch=trainer.steps_per_epoch, epochs=trainer.recipe.train.epochs
        )
    except ValueError as error:
        raise LotteryError(f"rewind: {error}") from None
    if step >= trainer.steps:
        raise LotteryError(
            f"rewind={lottery.rewind} leaves nothing to train: the training ends at step {trainer.steps}"
        )
    return step


def _pruned(before: checkpoint.Checkpoint, trainer: Trainer, lottery: Lottery, level: int):
    """Returns masks of the largest active weights, as many as the level keeps."""
    masks = before.masks
    layers = {name: Layer(before.model[name]) for name in masks}
    n = distribution.budget(topology.total_of(layers), 1 - lottery.sparsity_after(level))
    if lottery.scope == "global":
        return topology.prune_to(masks, n, layers, magnitude)
    counts = distribution.scale({name: topology.count(mask) for name, mask in masks.items()}, n)
    return topology.prune_each(masks, counts, layers, magnitude)


def _early(first: Run, step: int) -> checkpoint.Checkpoint:
    """Returns the dense network as it was at ``step``; its initial state is computed again from recipe and seed."""
    if step:
        return checkpoint.load(first.checkpoints / f"{step:08d}")
    trainer = Trainer(first.recipe)
    return checkpoint.Checkpoint(first.checkpoints, 0, dict(trainer.model.state_dict()), trainer.state_dict())
