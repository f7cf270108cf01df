"""Messages for values of a recipe or a sweep that are not valid; pydantic finds them, the words are granet's.

A problem is a line such as `train.lr: must be greater than 0, got -1`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from granet.names import nearest
from granet.text import printable, short

SHOWN = 20  # problems that a message lists at most

STEPS = "is not a number of steps: write 1000, '1000it', '80ep' or '50%' (of the training)"
_KINDS = {"int": "must be a whole number", "float": "must be a number", "str": "must be a text"}
_WORDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be a finite number",
    "int_type": _KINDS["int"],
    "int_from_float": _KINDS["int"],
    "int_parsing": _KINDS["int"],
    "int_parsing_size": "has too many digits",
    "float_type": _KINDS["float"],
    "float_parsing": _KINDS["float"],
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": _KINDS["str"],
    "string_too_long": "must have {max_length} characters at most",
    "too_short": "needs at least {min_length}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "mapping_type": "must be a mapping of keys to values",
    "invalid_key": "a key must be a text",
    "missing": "is missing",
}


def suggest(given: object, choices: Iterable[str]) -> str:
    """Returns the end of an error message: the choice nearest to `given`, and all choices.

    >>> suggest("regl", ["granet", "rigl"])
    "did you mean 'rigl'? (choices: granet, rigl)"
    """
    choices = list(choices)
    near = nearest(given, choices)
    return (f"did you mean {near[0]!r}? " if near else "") + f"(choices: {', '.join(choices)})"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: of what type, where, what was given, and in words."""

    type: str
    path: tuple[str, ...]
    given: Any
    context: Mapping[str, Any]
    words: str

    @property
    def where(self) -> str:
        """The place, such as `train.lr`."""
        return printable(".".join(self.path)) or "the whole"

    def __str__(self) -> str:
        said = f"{self.where}: {self.words}"
        known = self.type == "missing" or (isinstance(self.given, str) and short(self.given) in self.words)
        return said if known else f"{said}, got {short(self.given)}"


def problems(error: ValidationError) -> Iterator[Problem]:
    """Yields what pydantic has found, a value that fits none of several types once."""
    seen: dict[tuple[str, ...], list[str]] = {}
    found = error.errors(include_url=False)
    for one in found:
        path = tuple(map(str, one["loc"]))
        if one["type"] == "too_short" and any(tuple(map(str, other["loc"]))[:-1] == path for other in found):
            continue  # a list whose entries are wrong is counted as empty
        if path and path[-1] in _KINDS and one["type"].partition("_")[0] in ("int", "float", "string"):
            path, member = path[:-1], path[-1]
            kinds = seen.setdefault(path, [])
            kinds.append(member)
            if kinds == ["int"]:
                continue  # what the other types say follows
            words = STEPS if kinds == ["int", "str"] else _KINDS["float"]
        else:
            known = _WORDS.get(one["type"], "")
            words = known.format(**_limits(one.get("ctx", {}))) or one["msg"].removeprefix("Value error, ")
        yield Problem(one["type"], path, one["input"], one.get("ctx", {}), words)


def _limits(context: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: f"{x:,}" if isinstance(x, int) else f"{x:g}" for key, x in context.items() if isinstance(x, int | float)
    }


def refusal(
    what: str,
    error: ValidationError,
    root: type[BaseModel],
    variants: Mapping[str, type[BaseModel]],
    above: tuple[str, ...] = (),
    also: Iterable[str] = (),
) -> str:
    """Returns the message that refuses `what`, a line a problem.

    Args:
        what: what is not valid.
        error: what pydantic says of it.
        root: the model of the whole, which knows what keys there are.
        variants: the alternatives for its `method`, by name.
        above: where in the whole the part is that was looked at.
        also: keys that are possible beside those of the root.
    """
    found = [replace(one, path=(*above, *one.path)) for one in problems(error)]
    lines = [f"  {_line(one, root, variants, also)}" for one in found[:SHOWN]]
    more = [f"  ... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    if len(found) == 1:
        return f"{what} is not valid: {lines[0].strip()}"
    return "\n".join([f"{what} is not valid:", *lines, *more])


def _line(problem: Problem, root: Any, variants: Mapping[str, type[BaseModel]], also: Iterable[str]) -> str:
    """Returns one line: where in the whole, what is wrong, what is allowed."""
    path, given, section = list(problem.path), problem.given, root
    for part in path if problem.type != "extra_forbidden" else path[:-1]:
        if part in getattr(section, "model_fields", {}):
            section = section.model_fields[part].annotation
        elif part in variants and path[0] == "method":
            section = variants[part]
    if path[:1] == ["method"] and len(path) > 1 and path[1] in variants:
        del path[1]  # pydantic's name of the alternative, which is no key of the file
    problem = replace(problem, path=tuple(path))
    match problem.type:
        case "extra_forbidden":
            choices = [*section.model_fields, *(also if section is root else ())]
            return f"{problem.where}: there is no such key; {suggest(path[-1], choices)}"
        case "union_tag_invalid":
            return f"{problem.where}: there is no method {short(given.get('name'))}; {suggest(given['name'], variants)}"
        case "union_tag_not_found":
            return f"{problem.where}.name: is missing; choose from {', '.join(variants)}"
        case "string_pattern_mismatch":
            return str(
                replace(problem, words="a name must not be empty, contain a slash, or begin with a dot or a dash")
            )
        case "literal_error":
            choices = [str(choice) for choice in re.findall(r"'([^']*)'", problem.context["expected"])]
            return f"{problem.where}: {short(given)} is not possible; {suggest(given, choices)}"
    return str(problem)
