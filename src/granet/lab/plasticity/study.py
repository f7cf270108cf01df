"""The study of pruning plasticity: what is pruned, when, by how much, and what is regenerated (GraNet, section 3.1).

One run for each pretrained sparsity and seed leaves checkpoints at the moments of the study; from every checkpoint
start the cells, one for each pruning rate and arm. Nothing here needs torch.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from granet.train import recipes
from granet.train.recipe import Recipe, RecipeError, in_steps, suggest, validate

ARMS = {
    "none": "pruned, nothing regenerated",
    "restore": "pruned, and as many weights regenerated in every layer: the density before (as the official study)",
    "equal": "pruned further, and regenerated to the density of `none` in every layer: regeneration at no cost",
}
"""What follows the pruning; new weights start at zero, where the gradient of the unpruned network is largest."""

SIXTEENTHS = tuple(f"{6.25 * i:g}%" for i in range(1, 16))


class StudyError(ValueError):
    """A study that cannot be made: says what was given, and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of one-shot prunings; moments and lengths are epochs (``10``), ``"1000it"``, or ``"50%"`` of the training.

    Attributes:
        at: the moments of pruning, after so many epochs.
        prune: pruning rates, shares of the weights that are active at that moment.
        regenerate: the arms; see `ARMS`.
        scope: where weights compete to stay: in all layers together, or layerwise.
        retrain: k, how long the pruned network trains at the learning rate frozen when it was pruned.
        pretrained_sparsity: of the networks that are pruned; trained from scratch with a static uniform topology.
        seeds: of everything random.
        batches: how many batches the gradient for regeneration is averaged over.
        exchange: of the weights that are left, the share that the arm ``equal`` gives up for regenerated ones.

    Raises:
        StudyError: a value is impossible.
    """

    at: tuple[str, ...] = SIXTEENTHS
    prune: tuple[float, ...] = (0.2, 0.5, 0.9, 0.98)
    regenerate: tuple[str, ...] = tuple(ARMS)
    scope: Literal["global", "layerwise"] = "global"
    retrain: str = "18.75%"
    pretrained_sparsity: tuple[float, ...] = (0.0, 0.5, 0.9, 0.98)
    seeds: tuple[int, ...] = (0,)
    batches: int = 1
    exchange: float = 0.5

    def __post_init__(self):
        for name in ("at", "prune", "regenerate", "pretrained_sparsity", "seeds"):
            if not getattr(self, name):
                raise StudyError(f"{name} is empty: there would be nothing to study")
        for arm in self.regenerate:
            if arm not in ARMS:
                raise StudyError(f"there is no arm {arm!r} of regeneration; {suggest(arm, ARMS)}")
        if self.scope not in ("global", "layerwise"):
            raise StudyError(f"scope {self.scope!r} is not possible; {suggest(self.scope, ('global', 'layerwise'))}")
        for rate in self.prune:
            if not 0 < rate < 1:
                raise StudyError(f"a pruning rate is a share above 0 and below 1, got {rate}")
        for sparsity in self.pretrained_sparsity:
            if not 0 <= sparsity < 1:
                raise StudyError(f"a pretrained sparsity is a share from 0 and below 1, got {sparsity}")
        if not 0 < self.exchange < 1:
            raise StudyError(f"exchange is a share above 0 and below 1, got {self.exchange}")
        if self.batches < 1:
            raise StudyError(f"batches={self.batches}: the gradient needs at least one")


PRESETS: dict[str, tuple[str, Study]] = {
    "plasticity-digits": (
        "plasticity-digits",
        Study(at=("2", "4", "6", "7", "9", "10"), retrain="2"),
    ),
    "plasticity-fashion": (
        "plasticity-fashion",
        Study(at=("2", "5", "8", "10", "13", "15", "18"), retrain="4"),
    ),
    "plasticity-cifar10": (
        "plasticity-cifar10",
        Study(at=("2.5", "3.5", "5"), retrain="1", pretrained_sparsity=(0.0, 0.9)),
    ),
    "resnet20-paper": (
        "cifar10-resnet20",
        Study(at=tuple(f"{10 * i}" for i in range(1, 16)), retrain="30", seeds=(0, 1, 2)),
    ),
}
"""Studies of the package: the recipe, and the grid. Any other recipe is studied on the grid of `Study`'s defaults."""
DEFAULT = "plasticity-digits"


def resolve(name: str) -> tuple[str, Study]:
    """Returns the recipe and the grid of a study by its name; a recipe is a study as well.

    >>> resolve("resnet20-paper")[0]
    'cifar10-resnet20'
    """
    return PRESETS.get(name, (name, Study()))


def is_run(what: str | Path) -> bool:
    """Whether a run directory is meant; a study's name is, also where a folder of that name lies around."""
    known = str(what) in PRESETS or str(what) in recipes.names()
    return (Path(what) / "recipe.yaml").is_file() or (Path(what).is_dir() and not known)


@dataclass(frozen=True)
class Cell:
    """One pruning: plain data, so that any process can make it."""

    run: str  # the run directory whose checkpoint it starts from
    step: int
    rate: float
    arm: str
    scope: str
    retrain: int  # k, in steps
    batches: int
    exchange: float

    def file(self, folder: Path, recipe: Recipe) -> Path:
        """Returns where its result is, named by all that it depends on."""
        values = asdict(self) | {"run": _digest(recipe)}
        if self.arm == "none":
            values |= {"batches": None}
        if self.arm != "equal":
            values |= {"exchange": None}
        key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"{values['run']}-{self.step:08d}-{self.rate:g}-{self.arm}-{key}.json"


def _digest(recipe: Recipe) -> str:
    """Returns the recipe's digest without what it keeps and how often it looks, which change no weight."""
    quiet = dict.fromkeys(("keep", "log", "evaluate", "checkpoint"))
    defaults = {name: type(recipe.train).model_fields[name].default for name in quiet}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=defaults)}).digest()


def epochs(value: str | float) -> str | int:
    """Returns a moment as recipes write it; a bare number is epochs.

    >>> epochs("10"), epochs(2.5), epochs("50%")
    ('10ep', '2.5ep', '50%')
    """
    try:
        return f"{float(value):g}ep"
    except ValueError:
        return value


def moments(study: Study, recipe: Recipe, steps_per_epoch: int) -> tuple[int, ...]:
    """Returns the moments of pruning in steps, ascending.

    Raises:
        StudyError: one is not within the training.
    """
    length = steps_per_epoch * recipe.train.epochs
    found = set()
    for at in study.at:
        step = _steps(at, recipe, steps_per_epoch)
        if not 0 < step <= length:
            raise StudyError(
                f"at {at}: the training has {recipe.train.epochs} epochs ({length} steps); a moment of pruning is "
                f"after its first step and not after its last"
            )
        found.add(step)
    return tuple(sorted(found))


def retraining(study: Study, recipe: Recipe, steps_per_epoch: int) -> int:
    """Returns k in steps.

    Raises:
        StudyError: it is no step long.
    """
    steps = _steps(study.retrain, recipe, steps_per_epoch)
    if steps < 1:
        raise StudyError(f"retrain {study.retrain}: that is less than a step")
    return steps


def _steps(value: str, recipe: Recipe, steps_per_epoch: int) -> int:
    try:
        return in_steps(epochs(value), steps_per_epoch=steps_per_epoch, epochs=recipe.train.epochs)
    except ValueError:
        raise StudyError(f"{value!r} is no moment: write 10 (epochs), '1000it' or '50%' (of the training)") from None


def pretraining(study: Study, recipe: Recipe, keep: Iterable[int]) -> list[Recipe]:
    """Returns the recipes of the networks that are pruned, the first seed of all before the second of any."""
    found = []
    for seed in study.seeds:
        for sparsity in study.pretrained_sparsity:
            values: dict[str, Any] = recipe.model_dump() | {"seed": seed, "name": f"{title(recipe)}-{sparsity:g}"}
            sparse = {"name": "static", "sparsity": sparsity, "distribution": "uniform"}
            values["method"] = sparse if sparsity else {"name": "dense"}
            values["train"] |= {"keep": tuple(keep)}
            found.append(validate(values, source=recipe.name))
    return found


def title(recipe: Recipe) -> str:
    """Returns the recipe's name without its method's, which has no part in the study."""
    return recipe.name.removesuffix(f"-{recipe.method.name}")


def cells(study: Study, run: Path, steps: Iterable[int], retrain: int) -> list[Cell]:
    """Returns the cells that start from the checkpoints of one run."""
    return [
        Cell(str(run), step, rate, arm, study.scope, retrain, study.batches, study.exchange)
        for step in steps
        for rate in study.prune
        for arm in study.regenerate
    ]


def load_recipe(name: str) -> Recipe:
    """Returns the recipe ``name``, dense; its own method has no part in the study.

    Raises:
        RecipeError: there is no such recipe or study.
    """
    try:
        return recipes.load(name, method="dense")
    except RecipeError as error:
        near = suggest(name, PRESETS)
        raise RecipeError(f"{error}; studies of the package: {near}") from None
