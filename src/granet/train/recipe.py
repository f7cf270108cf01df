"""Recipes: what to train, on what, how. Strict YAML in, frozen models out, units resolved to steps once.

`granet.train.sections` has the parts of a recipe, `granet.train.recipes` reads the files. Nothing here needs torch, so
that the command line answers at once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError

from granet.methods.base import Method
from granet.text import printable
from granet.train.problems import refusal
from granet.train.problems import suggest as suggest
from granet.train.sections import MOST as MOST
from granet.train.sections import SECTIONS as SECTIONS
from granet.train.sections import AnyMethod, Data, Model, Section, Train
from granet.train.sections import MethodSection as MethodSection
from granet.train.sections import RecipeError as RecipeError
from granet.train.sections import Steps as Steps
from granet.train.sections import in_steps as in_steps

if TYPE_CHECKING:
    from torch import nn

    from granet.selection import Plan


def _check_name(name: str) -> str:
    if printable(name) != name or "\n" in name or "\t" in name:
        raise ValueError("a name must not contain control characters")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"a name must have {LONGEST} bytes at most, because the run's directory is named after it")
    return name


LONGEST = 180  # what follows it in the names of directories and files has its place too
Name = Annotated[str, Field(pattern=r"^[^\s./\\-][^/\\]*$"), AfterValidator(_check_name)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Recipe(Section):
    """One training run: data, model, method, training, seed."""

    name: Name = Field("custom", description="Name of the run, which its directory starts with.")
    data: Data
    model: Model
    method: AnyMethod
    train: Train = Train()
    seed: Seed = Field(0, description="Seed of weights, topology, data order and augmentation.")

    def resolve(self, steps_per_epoch: int) -> Method:
        """Returns the method with every step count resolved; the only place where units become steps."""
        return self.method.build(steps_per_epoch=steps_per_epoch, epochs=self.train.epochs)

    def skipped(self, model: "nn.Module") -> tuple[str, ...]:
        """Returns what a sparsifier's `skip` gets: what is to stay dense, and the layers that the pattern does not fit.

        Args:
            model: the network.
        """
        from granet.selection import unfit

        return (*self.model.keep_dense, *unfit(model, self.model.pattern, skip=self.model.keep_dense))

    def plan(self, model: "nn.Module", steps_per_epoch: int) -> "Plan":
        """Returns the plan of the network: which parameters are sparse, and their first and last budgets.

        Args:
            model: the network.
            steps_per_epoch: optimizer steps in an epoch.

        Raises:
            ValueError: the method is impossible with these steps, or does not fit the network.
        """
        from granet.selection import plan

        method = self.resolve(steps_per_epoch)
        skip, pattern = self.skipped(model), self.model.pattern
        return plan(model, method, skip=skip, pattern=pattern, storage=self.train.storage)

    def to_yaml(self, *, defaults: bool = True) -> str:
        """Returns the recipe as YAML, which `load` reads back to an equal recipe."""
        values = self.model_dump(mode="json", exclude_defaults=not defaults)
        values["method"] = {"name": self.method.name} | values["method"]
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)

    def digest(self) -> str:
        """Returns six hexadecimal digits that tell what is not default, where data lie left aside."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude={"name": True, "data": {"root"}})
        values["method"] = {"name": self.method.name} | values["method"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


FILE_KEYS = {
    "base": "The recipe that this one starts from: one of the package, or a file beside this one, without its .yaml.",
    "summary": "One line for `granet ls recipes`.",
    "methods": "Settings of each method for this task, by name; `method` may name one of them.",
}
"""What a recipe file holds beside the sections of a recipe; `granet.train.recipes` reads it."""


def validate(values: Mapping[str, Any], *, source: str, also: Iterable[str] = ()) -> Recipe:
    """Returns the recipe in `values`.

    Args:
        values: the sections, as YAML gives them.
        source: where they come from, for messages.
        also: keys that are possible there beside the sections, for messages.

    Raises:
        RecipeError: all that is wrong, one line each, with the nearest valid choice.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise explained(error, source, also) from None


def explained(error: ValidationError, source: str, also: Iterable[str] = ()) -> RecipeError:
    """The error that says, in one line each, what is wrong with a recipe, or with a section of one."""
    above = {"Data": ("data",), "Model": ("model",), "Train": ("train",)}
    above |= {section.__name__: ("method",) for section in SECTIONS.values()}
    return RecipeError(refusal(f"the recipe {source}", error, Recipe, SECTIONS, above.get(error.title, ()), also))


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe file, which editors use to complete and check it."""
    result = Recipe.model_json_schema()
    method, variant = result["properties"]["method"], {"type": "object", "additionalProperties": {"type": "object"}}
    result["properties"] |= {
        "base": {"type": "string", "description": FILE_KEYS["base"]},
        "summary": {"type": "string", "description": FILE_KEYS["summary"]},
        "methods": variant | {"description": FILE_KEYS["methods"]},
        "method": {"anyOf": [{"type": "string", "description": "One of `methods`."}, method]},
    }
    del result["required"]  # what a file leaves out, its base may have
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "granet recipe"} | result
