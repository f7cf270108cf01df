"""Recipe files: those the package ships, and your own.

A recipe file holds the sections of `Recipe`, and three keys of its own: `base` (the recipe it starts
from), `summary` (one line for `granet ls recipes`) and `methods` (settings of each method for this task, one of
which `method` names). A file `fashion.yaml` whose `methods` has `rigl` is also the recipe `fashion-rigl`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granet.names import nearest
from granet.parsing import from_yaml
from granet.registry import Registry
from granet.text import short
from granet.train.recipe import FILE_KEYS, SECTIONS, Recipe, RecipeError, suggest, validate


@dataclasses.dataclass(frozen=True)
class RecipeFile:
    """A recipe file with what it inherits: sections of `Recipe`, and the settings of each method for this task."""

    name: str
    summary: str
    sections: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]

    def recipe(self, variant: str | None = None, settings: Mapping[str, Any] | None = None) -> Recipe:
        """Returns the recipe, with the method that the file chooses or with `variant`, which need not be in the file.

        A method without settings in the file takes its own defaults, and the sparsity of the file's choice; over all
        of these are laid `settings`.
        """
        chosen = variant or self.sections.get("method")
        if isinstance(chosen, str):
            method = self.methods.get(chosen)
            if method is None and chosen in SECTIONS:
                method = {"name": chosen}
                if "sparsity" in SECTIONS[chosen].model_fields:
                    method["sparsity"] = self.recipe().method.model_dump().get("sparsity")
            if method is None:
                there = [*self.methods, *(name for name in SECTIONS if name not in self.methods)]
                raise RecipeError(f"the recipe {self.name} has no method {chosen!r}; {suggest(chosen, there)}")
        else:
            method = chosen
            chosen = method.get("name") if isinstance(method, Mapping) else None
        values = {"name": f"{self.name}-{chosen}"} | dict(self.sections)
        if method is not None:
            values["method"] = {**method, **(settings or {})} if isinstance(method, Mapping) else method
        return validate(values, source=self.name, also=FILE_KEYS)


RECIPES: Registry[Path] = Registry("recipe", home="granet.train.recipes")
"""Recipe files by name, those of granet and those that plugins register; with an underscore first, they only serve as
a base."""

for _path in sorted(Path(__file__).parent.glob("*.yaml")):
    RECIPES.add(_path.stem)(_path)


def read(path: Path, *, seen: tuple[Path, ...] = ()) -> RecipeFile:
    """Returns a recipe file merged over its base: mappings key by key, all else replaced; a method as a whole.

    Raises:
        RecipeError: no such file, no mapping in it, or bases in a circle.
    """
    try:
        values = from_yaml(path.read_bytes())
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {path}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it must be a mapping such as 'data: {{name: digits}}'")
    base, summary, methods = values.pop("base", None), values.pop("summary", ""), values.pop("methods", {})
    if not isinstance(summary, str):
        raise RecipeError(f"{path}: summary must be a line of text; got {short(summary)}")
    if not isinstance(methods, Mapping):
        raise RecipeError(f"{path}: methods must be a mapping from names to settings; got {short(methods)}")
    for name, settings in methods.items():
        if not isinstance(name, str) or not isinstance(settings, Mapping):
            allowed = f"a mapping such as '{name}: {{name: {name}, sparsity: 0.9}}'"
            raise RecipeError(f"{path}: methods.{name} must be {allowed}; got {short(settings)}")
    if base is not None:
        seen = (*seen, path.resolve())
        parent = _base(base, path)
        if parent.resolve() in seen:
            circle = " -> ".join(one.stem for one in (*seen, parent))
            raise RecipeError(f"the bases of {seen[0].name} go in a circle: {circle}")
        inherited = read(parent, seen=seen)
        values = _merge(inherited.sections, values)
        methods = _merge(inherited.methods, methods)
    return RecipeFile(path.stem.removeprefix("_"), summary, values, methods)


def _base(base: Any, path: Path) -> Path:
    """Returns the file that the recipe file `path` calls its base: one beside it, or one of the package."""
    if not isinstance(base, str) or not base or len(base) > 200 or "\0" in base:
        raise RecipeError(f"{path}: base must be the name of a recipe; got {short(base)}")
    near = path.parent / f"{base}.yaml"
    parent = near if near.exists() else RECIPES.get(base)
    if parent is None:
        raise RecipeError(f"{path} has no base {base!r}; {suggest(base, RECIPES)}, or {near}")
    return parent


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with `over` laid on it; a method is one thing and replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and key != "method"
        merged[key] = _merge(base[key], value) if both else value
    return merged


def names() -> list[str]:
    """Returns the names of all shipped recipes, variants included."""
    return [name for file in catalog() for name in (file.name, *(f"{file.name}-{v}" for v in file.methods))]


def catalog() -> list[RecipeFile]:
    """Returns the recipe files of the package that can be run."""
    return [read(path) for name, path in RECIPES.items() if not name.startswith("_")]


def load(name: str, *, method: str | None = None, settings: Mapping[str, Any] | None = None) -> Recipe:
    """Returns a recipe by its name, such as `digits` or `cifar10-vgg19-rigl`, or from a YAML file.

    Args:
        name: a shipped recipe, or a path that ends in `.yaml` or `.yml`.
        method: train with this method instead of the one that the recipe chooses.
        settings: hyper-parameters of the method that are not as the recipe has them.

    Raises:
        RecipeError: no such recipe, or it is not valid.

    >>> load("digits").method.name, load("digits-rigl").method.name, load("digits", method="set").name
    ('granet', 'rigl', 'digits-set')
    """
    if name.endswith((".yaml", ".yml")):
        return read(Path(name)).recipe(method, settings)
    paths = {stem: path for stem, path in RECIPES.items() if not stem.startswith("_")}
    for stem in sorted(paths, key=len, reverse=True):
        if name == stem:
            return read(paths[stem]).recipe(method, settings)
        if name.startswith(f"{stem}-"):
            file, variant = read(paths[stem]), name.removeprefix(f"{stem}-")
            if variant in file.methods:
                return file.recipe(method or variant, settings)
    raise RecipeError(f"there is no recipe {name!r}; {_near_recipe(name)}")


def _near_recipe(name: str) -> str:
    near = nearest(name, names())
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}`granet ls recipes` lists them; a file of your own ends in .yaml"
