"""Sweep files: recipes, methods, settings and seeds in TOML, expanded to one recipe a cell.

```toml
recipe = ["digits"]                    # one or several
seeds = [0, 1, 2]
methods = [
    "dense",                           # as in `granet train digits --method dense`
    {name = "granet", label = "GraNet (s_i = 0.5)", method.initial_sparsity = 0.5},
]

[grid]                                 # every combination
method.sparsity = [0.9, 0.98]
train.epochs = 10
```

A setting of the grid that a method does not have, such as the sparsity of a dense network, does not multiply its runs.
Nothing here needs torch.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from granet.parsing import from_toml
from granet.text import short
from granet.train import recipes
from granet.train.problems import Problem, problems
from granet.train.recipe import SECTIONS, Name, Recipe, RecipeError, Section, Seed, suggest, validate

SHOWN = 8  # the problems that a message lists
MOST = 10_000  # runs in a sweep


class SweepError(ValueError):
    """A sweep that cannot be run. The message says where the problem is, what was given and what is allowed."""


class Settings(Section):
    """Values laid over a recipe, by section; a list holds several, each of which makes a cell."""

    data: dict[str, Any] = Field({})
    model: dict[str, Any] = Field({})
    method: dict[str, Any] = Field({})
    train: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        """Takes ``"method.sparsity" = 0.9`` for ``method.sparsity = 0.9``."""
        if not isinstance(values, Mapping):
            return values
        nested: dict[str, Any] = {}
        for key, value in values.items():
            section, dot, name = key.partition(".")
            value = {name: value} if dot else value
            if section in nested:
                if not (isinstance(value, Mapping) and isinstance(nested[section], Mapping)):
                    raise ValueError(f"{section} is given twice")
                value = {**nested[section], **value}
            nested[section] = value
        return nested

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The values of each key, such as ``{"method.sparsity": (0.9, 0.98)}``."""
        return {
            f"{section}.{name}": tuple(value) if isinstance(value, list) else (value,)
            for section in ("data", "model", "method", "train")
            for name, value in getattr(self, section).items()
        }

    @model_validator(mode="after")
    def _no_axis_is_empty(self) -> "Settings":
        for key, values in self.axes.items():
            if not values:
                raise ValueError(f"{key} is an empty list: there would be nothing to run")
        return self


class Entry(Settings):
    """A method of the sweep: its name in the recipe, what the table calls it, and settings of its own."""

    name: str
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, values: Any) -> Any:
        return {"name": values} if isinstance(values, str) else values

    @property
    def title(self) -> str:
        """What the table calls it."""
        return self.label or self.name


class Reporting(Section):
    """What the tables say."""

    select: Literal["last", "best"] = Field(
        "last", description="Whose test accuracy is compared: the last weights, or the best by validation."
    )
    compare: tuple[tuple[str, str], ...] = Field((), description="Pairs of methods whose gap is computed.")


class Sweep(Section):
    """A sweep file."""

    name: Name  # of the folder of its tables, too
    summary: str = ""
    recipe: tuple[str, ...] = Field(min_length=1)
    methods: tuple[Entry, ...] = Field(min_length=1)
    grid: Settings = Settings()
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    report: Reporting = Reporting()

    @field_validator("recipe", mode="before")
    @classmethod
    def _one_recipe(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _labels_tell_methods_apart(self) -> "Sweep":
        titles = [entry.title for entry in self.methods]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two methods are called {title!r}: give each a label of its own")
        for title in itertools.chain.from_iterable(self.report.compare):
            if title not in titles:
                raise ValueError(f"report.compare: there is no method {title!r} here; {suggest(title, titles)}")
        return self

    @property
    def varied(self) -> tuple[str, ...]:
        """The keys that have several values in the grid or in a method, the sparsity first."""
        axes = [self.grid.axes, *(entry.axes for entry in self.methods)]
        keys = dict.fromkeys(key for one in axes for key, values in one.items() if len(values) > 1)
        return tuple(sorted(keys, key=lambda key: key != "method.sparsity"))


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep."""

    task: str  # the recipe as the sweep names it
    label: str  # the method as the table calls it
    recipe: Recipe
    apart: tuple[str, ...] = ()  # in what it was not trained as the rest of the sweep

    def at(self, key: str) -> Any:
        """Returns the setting ``key``, such as ``train.epochs``; None if its method has none."""
        section, _, name = key.partition(".")
        return getattr(getattr(self.recipe, section), name, None)


def folder() -> Path:
    """Returns where the sweeps of the package are."""
    return Path(recipes.__file__).parents[1] / "sweeps"


def names() -> list[str]:
    """Returns the names of the sweeps of the package."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def load(name: str) -> Sweep:
    """Returns a sweep of the package by its name, or of a TOML file by its path.

    Raises:
        SweepError: no such sweep, or a file that is none.

    >>> sweep = load("digits")
    >>> sweep.recipe, sweep.varied
    (('digits',), ('method.sparsity',))
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in names():
            raise SweepError(f"there is no sweep {name!r}; {suggest(name, names())}; one of your own ends in .toml")
        path = folder() / f"{name}.toml"
    try:
        values = from_toml(path.read_bytes())
    except FileNotFoundError:
        raise SweepError(f"there is no file {path}; sweeps of the package: {', '.join(names())}") from None
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SweepError(f"{path} cannot be read as TOML: {error}") from None
    return parse({"name": path.stem} | values, source=path)


def parse(values: Mapping[str, Any], *, source: Path) -> Sweep:
    """Returns the sweep in ``values``; recipe files beside ``source`` are found.

    Raises:
        SweepError: all that is wrong, one line each.
    """
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_explain(problem)}" for problem in problems(error)][:SHOWN]
        raise SweepError("\n".join([f"the sweep {source} is not valid:", *lines])) from None
    beside = tuple(str(near) if (near := source.parent / one).is_file() else one for one in sweep.recipe)
    return sweep.model_copy(update={"recipe": beside})


def _explain(problem: Problem) -> str:
    path = problem.path
    if problem.type == "extra_forbidden":
        kind = {"methods": Entry, "grid": Settings, "report": Reporting}.get(path[0] if path[1:] else "", Sweep)
        return f"{problem.where}: there is no such key; {suggest(path[-1], kind.model_fields)}"
    if problem.type == "string_pattern_mismatch":
        allowed = "a name must not be empty, contain a slash, or begin with a dot or a dash"
        return f"{problem.where}: {allowed}; got {short(problem.given)}"
    if problem.type == "value_error":
        return f"{problem.where}: {problem.words}" if path else problem.words
    return str(problem)


def cells(sweep: Sweep) -> list[Cell]:
    """Returns every run of the sweep, the first seed of all before the second of any.

    Raises:
        SweepError: a cell's recipe is not valid, or a key belongs to no method, all of which are named; or there are
            more runs than can be meant.
    """
    _refuse_many(len(sweep.recipe) * len(sweep.methods), "recipes times methods")
    found: list[Cell] = []
    problems: list[str] = []
    used: set[str] = set()
    planned: list[tuple[str, Entry, Recipe, dict[str, tuple[Any, ...]]]] = []
    for task, entry in itertools.product(sweep.recipe, sweep.methods):
        try:
            base = _base(entry, task)
        except RecipeError as error:
            problems.append(f"{task}, {entry.title}: {error}")
            continue
        known = SECTIONS[base.method.name].model_fields
        grid = {
            key: values
            for key, values in sweep.grid.axes.items()
            if not key.startswith("method.") or key.removeprefix("method.") in known
        }
        used |= grid.keys()
        planned.append((task, entry, base, grid | entry.axes))
    runs = sum(math.prod(map(len, axes.values())) for *_, axes in planned) * len(sweep.seeds)
    _refuse_many(runs, "methods, settings and seeds multiplied out")
    for task, entry, base, axes in planned:
        for combination in itertools.product(*axes.values()):
            settings = dict(zip(axes, combination, strict=True))
            try:
                recipe = _laid_over(base, settings)
            except RecipeError as error:
                problems.append(f"{place(task, entry.title, settings)}: {error}")
                continue
            apart = tuple(_difference(key, settings[key], sweep.grid.axes, base) for key in entry.axes)
            cell = Cell(task, entry.title, recipe, tuple(filter(None, apart)))
            found += [
                Cell(task, cell.label, recipe.model_copy(update={"seed": seed}), cell.apart) for seed in sweep.seeds
            ]
    for key in sweep.grid.axes.keys() - used if not problems else ():
        fields = {f"method.{name}" for entry in sweep.methods for name in _fields(entry, sweep.recipe[0])}
        problems.append(f"grid: no method here has {key}; {suggest(key, sorted(fields))}")
    refuse(problems)
    return sorted(found, key=lambda cell: sweep.seeds.index(cell.recipe.seed))


def _refuse_many(number: int, what: str) -> None:
    if number > MOST:
        raise SweepError(f"the sweep has {number:,} runs ({what}), and {MOST:,} are the most: take values away")


def refuse(problems: list[str]) -> None:
    """Raises SweepError with the problems if there are any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise SweepError("\n".join(["the sweep cannot be run:", *(f"  {one}" for one in problems[:SHOWN] + more)]))


def place(task: str, label: str, settings: Mapping[str, Any]) -> str:
    """Returns where in the sweep something is, such as ``digits, RigL, method.sparsity 0.9``."""
    return ", ".join([task, label, *(f"{key} {value}" for key, value in settings.items() if value is not None)])


def _fields(entry: Entry, task: str) -> list[str]:
    return list(type(_base(entry, task).method).model_fields)


def _base(entry: Entry, task: str) -> Recipe:
    """Returns the recipe with the entry's method, its first settings among it: some methods need those to be whole."""
    own = {name: value[0] if isinstance(value, list) else value for name, value in entry.method.items()}
    return recipes.load(task, method=entry.name, settings=own)


def _laid_over(base: Recipe, settings: Mapping[str, Any]) -> Recipe:
    values = base.model_dump()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values[section] |= {name: value}
    return validate(values, source=base.name)


def _difference(key: str, value: Any, grid: Mapping[str, tuple], base: Recipe) -> str | None:
    """Returns in what a method's own setting, the method's hyper-parameters aside, leaves the common ground."""
    section, _, name = key.partition(".")
    common = grid.get(key, (getattr(getattr(base, section), name),))
    if section == "method" or value in common:
        return None
    return f"{key} {value} instead of {' or '.join(map(str, common))}"
