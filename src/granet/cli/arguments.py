"""From words to a recipe: which one, which method, what is changed."""

from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

import tyro
from pydantic import ValidationError, create_model

from granet import recipes
from granet.recipe import Recipe, RecipeError, explained, validate

DEFAULT = "digits"
SHORT = {"--engine": "--train.engine"}


@dataclass(frozen=True)
class Request:
    """What the user asks for: a recipe with all changes, the recipe as loaded, and the command's own options."""

    recipe: Recipe
    loaded: Recipe
    source: str
    options: Any


def parse(args: list[str], options: type, *, prog: str, description: str) -> Request:
    """Returns what ``args`` ask for: ``[RECIPE] [--method NAME] [--section.key value ...]`` and ``options``.

    ``--engine`` is short for ``--train.engine``. The recipe and the method are found first, so that the rest is checked
    against the fields of that very method.

    Args:
        args: the words behind the command.
        options: a dataclass with defaults, the command's own options.
        prog: the command, for help.
        description: what it does, for help.

    Raises:
        RecipeError: no such recipe or method, or values that do not go together.
    """
    words = ["=".join([SHORT.get(flag, flag), *value]) for flag, *value in (word.split("=", 1) for word in args)]
    name = words.pop(0) if words and not words[0].startswith("-") else DEFAULT
    method = _take_method(words)
    recipe = recipes.load(name, method=method)
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
        result = tyro.cli(
            arguments, args=words, prog=f"{prog} [RECIPE]", description=about, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except ValidationError as error:  # of the recipe as a whole; that of a section tyro shows itself
        raise explained(error, name) from None
    settings = validate(result.settings.model_dump(), source=name)
    return Request(settings, recipe, name, result.options)


def _take_method(words: list[str]) -> str | None:
    """Removes ``--method NAME``, or ``--method.name NAME``, from ``words``; returns the name, None if none is given."""
    method = None
    for flag in ("--method", "--method.name"):
        while True:
            at = next((i for i, word in enumerate(words) if word == flag or word.startswith(f"{flag}=")), None)
            if at is None:
                break
            word = words.pop(at)
            if "=" in word:
                method = word.partition("=")[2]
            elif at < len(words):
                method = words.pop(at)
            else:
                raise RecipeError(f"{flag} needs a name; `granet ls methods` lists them")
    return method
