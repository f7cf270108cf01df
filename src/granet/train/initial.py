"""Where a training begins: the weights of another run, and the recipe of a training that goes on."""

import logging
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from granet import ranks
from granet.selection import select
from granet.train import checkpoint
from granet.train.recipe import Recipe, RecipeError, Steps, in_steps, validate

logger = logging.getLogger(__name__)


def source(path: Path) -> Path:
    """Returns the checkpoint that `path` means: itself, or of a run directory the best one, else the last.

    Raises:
        FileNotFoundError: it is neither a checkpoint nor a run directory.
        CheckpointError: the run has no checkpoint, or a damaged one.
    """
    if (path / "state.json").is_file():
        return path
    if not (path / "recipe.yaml").is_file():
        raise FileNotFoundError(f"train.init: {path} is neither a run directory nor a checkpoint of one")
    return checkpoint.pick(path / "checkpoints").path


def load(recipe: Recipe, model: nn.Module, here: ranks.Ranks) -> dict[str, Tensor] | None:
    """Puts the weights into `model` that `train.init` names, and returns their masks if the method keeps to them.

    Without `train.init` nothing is done. Only the method `fixed` trains within the masks of the other run; any
    other one starts from the weights alone, the inactive ones among them zero, and chooses its own masks.

    Args:
        recipe: the recipe.
        model: as it was built.
        here: the ranks, all of which call this; the first one reads.

    Raises:
        RecipeError: the weights are of another network, or other layers of it are sparse.
        FileNotFoundError, CheckpointError: as `source`.
    """
    if recipe.train.init is None:
        return None
    found = here.decide(lambda: checkpoint.load(source(Path(recipe.train.init))))
    mine = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = {name: tuple(tensor.shape) for name, tensor in found.model.items()}
    if mine != other:
        name = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))[0]
        raise RecipeError(
            f"train.init: {found.path} holds another network than {recipe.model.name} for {recipe.data.name}: "
            f"{name} is {other.get(name, 'missing')} there and {mine.get(name, 'missing')} here"
        )
    model.load_state_dict(found.model)
    if here.first:
        logger.info("beginning with the weights of %s", found.path)
    if recipe.method.name != "fixed":
        return None
    _refuse_other_layers(recipe, model, found)
    return found.masks


def _refuse_other_layers(recipe: Recipe, model: nn.Module, found: checkpoint.Checkpoint) -> None:
    """Raises RecipeError if other parameters are sparse by the recipe than have masks in the checkpoint."""
    sparse = {choice.name for choice in select(model, skip=recipe.skipped(model)) if choice.sparse}
    if other := sorted(sparse ^ set(found.masks)):
        theirs = found.state["sparsifier"]["pattern"]
        dense, where = ("dense", "sparse") if other[0] in sparse else ("sparse", "dense")
        raise RecipeError(
            f"train.init: in {found.path}, of the pattern {theirs}, {other[0]} is {dense}, and by this recipe, of the "
            f"pattern {recipe.model.pattern}, it is {where}: set model.pattern and model.keep_dense as they are there"
        )


def longer(recipe: Recipe, epochs: int, steps_per_epoch: int) -> Recipe:
    """Returns the recipe whose training is extended to `epochs`, of which the first part is as it was.

    Every share of the training becomes the number of steps that it was, so that the method does in the first part what
    it did, and goes on with the topology that it had at its end. The learning rate of a multistep or constant schedule
    stays at its last value; that of a cosine schedule is, from there on, the one of a training of the whole length.

    Raises:
        RecipeError: the training is so long already.
    """
    train = recipe.train
    if epochs <= train.epochs:
        raise RecipeError(f"the run has {train.epochs} epochs: {epochs} would not make it longer")
    if train.max_steps is not None:
        raise RecipeError(
            f"the run ended after {train.max_steps:,} steps (train.max_steps), before its schedules did, so there is "
            "no end to go on from: train it without train.max_steps first"
        )
    units = {"steps_per_epoch": steps_per_epoch, "epochs": train.epochs}

    def fixed(section: Any) -> dict[str, Any]:
        values = section.model_dump()
        for name, field in type(section).model_fields.items():
            if Steps in (field.annotation, *get_args(field.annotation)) or field.annotation == int | str:
                several = isinstance(values[name], tuple)
                steps = [
                    in_steps(value, **units) if str(value).endswith("%") else value
                    for value in (values[name] if several else [values[name]])
                ]
                values[name] = tuple(steps) if several else steps[0]
        return values

    values = recipe.model_dump() | {"train": fixed(train), "method": fixed(recipe.method)}
    stages = (*(in_steps(stage, **units) for stage in train.stages), train.epochs * steps_per_epoch)
    values["train"] |= {"epochs": epochs, "stages": stages}
    return validate(values, source=recipe.name)
