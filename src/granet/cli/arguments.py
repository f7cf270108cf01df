"""From words to a recipe: which one, which method, what is changed."""

from dataclasses import dataclass, field, make_dataclass
from itertools import pairwise
from typing import Annotated, Any

import tyro
from pydantic import ValidationError, create_model

from granet.cli import words
from granet.train import recipes
from granet.train.recipe import SECTIONS, Recipe, RecipeError, explained, validate

DEFAULT = "digits"
SHORT = {"--engine": "--train.engine", "--init-from": "--train.init", "--max-steps": "--train.max-steps"}


@dataclass(frozen=True)
class Request:
    """What the user asks for: a recipe with all changes, the recipe as loaded, and the command's own options."""

    recipe: Recipe
    loaded: Recipe
    source: str
    options: Any


def parse(args: list[str], options: type, *, prog: str, description: str, method: str | None = None) -> Request:
    """Returns what ``args`` ask for: ``[RECIPE] [--method NAME] [--section.key value ...]`` and ``options``.

    ``--engine`` is short for ``--train.engine``, and likewise all of ``SHORT``. The recipe and the method are found
    first, so that the rest is checked against the fields of that very method.

    Args:
        args: the words behind the command.
        options: a dataclass with defaults, the command's own options.
        prog: the command, for help.
        description: what it does, for help.
        method: the only method that the command trains with; none can be asked for then.

    Raises:
        RecipeError: no such recipe or method, or values that do not go together.
        UsageError: no such option, or a word that is no value of it.
    """
    given = ["=".join([SHORT.get(flag, flag), *value]) for flag, *value in (word.split("=", 1) for word in args)]
    name = given.pop(0) if given and not given[0].startswith("-") else DEFAULT
    asked = _take_method(given) or (_variant(name) if method else None)
    if method and asked not in (None, method):
        raise RecipeError(
            f"{prog} trains the method {method!r} and cannot train {asked!r}: name the recipe alone, without a method"
        )
    recipe = _load(name, method or asked, given)
    concrete = create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, method=(type(recipe.method), ...))
    default = concrete(**{key: getattr(recipe, key) for key in Recipe.model_fields})
    arguments = make_dataclass(
        "Arguments",
        [
            ("options", Annotated[options, tyro.conf.arg(name="")], field(default=options())),
            (
                "settings",
                Annotated[concrete, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff],
                field(default=default),
            ),
        ],
        frozen=True,
    )
    about = f"{description}\n\nThe options below are those of the recipe {name} with its method {recipe.method.name}."
    try:
        result = words.read(arguments, given, prog=f"{prog} [RECIPE]", description=about)
    except ValidationError as error:  # of the recipe as a whole, or of one of its sections
        raise explained(error, name) from None
    settings = validate(result.settings.model_dump(), source=name)
    _check_method(settings, name)
    return Request(settings, recipe, name, result.options)


def _load(name: str, method: str | None, given: list[str]) -> Recipe:
    """Returns the recipe; what it lacks of the method's settings may be among ``given``.

    Raises:
        RecipeError: as `recipes.load`, with the options that are needed.
    """
    fields = SECTIONS[method].model_fields if method in SECTIONS else {}
    needed = {f"--method.{key.replace('_', '-')}": key for key, one in fields.items() if one.is_required()}
    words = [part for word in given for part in word.split("=", 1)]
    settings = {needed[flag]: value for flag, value in pairwise(words) if flag in needed}
    try:
        try:
            return recipes.load(name, method=method)
        except RecipeError:
            if not settings:
                raise
        return recipes.load(name, method=method, settings=settings)
    except RecipeError as error:
        lacks = [flag for flag, key in needed.items() if f"method.{key}: is missing" in str(error)]
        raise RecipeError(f"{error}; add {', '.join(lacks)}" if lacks else str(error)) from None


def _check_method(recipe: Recipe, source: str) -> None:
    """Raises RecipeError if the method is impossible, however many steps an epoch of the data should have."""
    for steps_per_epoch in (10, 100, 1000, 10_000, 100_000):
        try:
            recipe.resolve(steps_per_epoch)
        except ValueError as error:
            problem = error
        else:
            return
    raise RecipeError(f"the recipe {source} is not valid: method: {problem}")


def _variant(name: str) -> str | None:
    """Returns the method that the name of a shipped recipe asks for, as ``digits-rigl`` does; None if it names none."""
    for file in recipes.catalog():
        method = name.removeprefix(f"{file.name}-")
        if method != name and method in file.methods:
            return method
    return None


def _take_method(given: list[str]) -> str | None:
    """Removes ``--method NAME``, or ``--method.name NAME``, from ``given``; returns the name, None if none is given."""
    method = None
    for flag in ("--method", "--method.name"):
        while True:
            at = next((i for i, word in enumerate(given) if word == flag or word.startswith(f"{flag}=")), None)
            if at is None:
                break
            word = given.pop(at)
            if "=" in word:
                method = word.partition("=")[2]
            elif at < len(given):
                method = given.pop(at)
            else:
                raise RecipeError(f"{flag} needs a name; `granet ls methods` lists them")
    return method
