"""From the words of a command line to values: one parser for all commands, whose errors are one line each."""

import io
import os
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, TypeVar

import tyro
from pydantic import ValidationError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from granet.names import nearest
from granet.train.recipe import suggest

T = TypeVar("T")


class UsageError(ValueError):
    """A command line that cannot be understood: says what was given, and what is possible."""


SPELLINGS = ConstructorRegistry()
"""How true, false and null are written: as in a recipe's YAML, and as in Python."""
PYTHON = {"True": "true", "False": "false", "None": "null"}


@SPELLINGS.primitive_rule
def _truth(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    return _spelt(lambda value: isinstance(value, bool), true=True, false=False) if info.type is bool else None


@SPELLINGS.primitive_rule
def _nothing(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    return _spelt(lambda value: value is None, null=None) if info.type is type(None) else None


def _spelt(is_instance: Any, **values: Any) -> PrimitiveConstructorSpec:
    python = tuple(word for word, yaml in PYTHON.items() if yaml in values)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(values)}}}",
        choices=(*values, *python),
        instance_from_str=lambda words: values[PYTHON.get(words[0], words[0])],
        is_instance=is_instance,
        str_from_instance=lambda value: [next(word for word in values if values[word] is value)],
    )


def read(kind: type[T], words: list[str], *, prog: str, description: str, also: Iterable[str] = ()) -> T:
    """Returns a value of the dataclass ``kind`` as ``words`` describe it.

    Args:
        kind: its fields are the options and arguments, their docstrings the help.
        words: what the user wrote behind the command.
        prog: the command, for help and messages.
        description: what it does, for help.
        also: further options of the command, which it has read by itself; they are named where they are nearest.

    Raises:
        UsageError: an unknown option (the message names the nearest one), or a value that does not fit.
        ValidationError: a pydantic model among the fields refuses its values.
        SystemExit: the words ask for help, which is printed.
    """
    helping = any(word in ("-h", "--help") for word in words)
    said, shown = io.StringIO(), io.StringIO()
    # into a file, tyro writes without colours
    plain = not helping or bool(os.environ.get("NO_COLOR"))
    try:
        with redirect_stderr(said), redirect_stdout(shown if plain else sys.stdout):
            return _parse(kind, words, prog, description)
    except SystemExit as end:
        if end.code in (0, None):
            print(shown.getvalue(), end="")
            raise
        problem: BaseException | None = end
        while problem is not None and not isinstance(problem, ValidationError):
            problem = problem.__cause__ or problem.__context__
        if isinstance(problem, ValidationError):
            raise problem from None
        raise UsageError(_explain(said.getvalue(), words, prog, [*options(kind), *also])) from None


def options(kind: type) -> list[str]:
    """Returns the names of all options of a dataclass, such as ``--train.epochs``."""
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(io.StringIO()), suppress(SystemExit):
        _parse(kind, ["--help"], "granet", "")
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown.getvalue())))


def unknown(flag: str, known: Iterable[str], prog: str) -> UsageError:
    """Returns the error for an unknown option; it names the known option whose spelling is nearest."""
    known = list(known)
    name = flag.rpartition(".")[2].lstrip("-")
    same = [one for one in known if one.rpartition(".")[2].lstrip("-") == name]
    near = same or nearest(flag, known)
    hint = f"did you mean {near[0]}?" if near else f"`{prog} --help` lists all"
    return UsageError(f"{prog} has no option {flag}; {hint}")


def _parse(kind: type[T], words: list[str], prog: str, description: str) -> T:
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, args=words, prog=prog, description=description, config=config, registry=SPELLINGS)


def _explain(box: str, words: list[str], prog: str, known: list[str]) -> str:
    """Returns in one line what tyro says in a box."""
    prog = prog.partition(" [")[0]
    spelt = [word.partition("=")[0] for word in words if word.startswith("--")]
    for flag in spelt:
        if flag.replace("_", "-") not in known:
            return str(unknown(flag, known, prog))
    # a title, a rule, what is wrong, and mostly another rule with help below it
    parts = re.split(r"^[^\w\n]*[─-]{3,}[^\w\n]*$", box, flags=re.M)
    text = " ".join(parts[1 if len(parts) > 1 else 0].split())
    for pattern, say in SAYINGS:
        if match := re.search(pattern, text):
            return say(match, prog)
    return text


def _choice(match: re.Match, prog: str) -> str:
    choices = [one for one in re.findall(r"'([^']*)'", match[3]) if one not in PYTHON]
    return f"{match[2]}: {match[1]!r} is not possible; {suggest(match[1], choices)}"


def _no_type(match: re.Match, _: str) -> str:
    kinds = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}
    said = [kinds.get(kind, kind.strip("{}")) for kind in match[2].split("|")]
    return f"{match[1]}: {match[3]!r} is not possible; write {' or '.join(said)}"


SAYINGS: tuple[tuple[str, Any], ...] = (
    (r"Unrecognized options: (.*)", lambda m, prog: f"{prog} cannot use {m[1]!r}; `{prog} --help` tells what it takes"),
    (r"Missing value for argument '(.+?)'", lambda m, prog: f"{m[1]} needs a value"),
    (r"invalid choice '(.*?)' for argument '(.+?)'\. Expected one of \((.*)\)", _choice),
    (r"Error parsing (\S+): invalid literal for int.*?'(.*)'", lambda m, prog: f"{m[1]}: {m[2]!r} is no whole number"),
    (r"Error parsing (\S+): could not convert.*?'(.*)'", lambda m, prog: f"{m[1]}: {m[2]!r} is no number"),
    (
        r"Missing from .*?: (\S+) (.*?)\.? \(required\)",
        lambda m, prog: f"{prog} needs {m[1]} ({m[2].lower()}); `{prog} --help` tells more",
    ),
    (r"Error parsing (\S+): no type matching (\S+) could be instantiated from \['(.*?)'", _no_type),
    (r"Error parsing (\S+): Failed to parse key-value", lambda m, prog: f"{m[1]} needs pairs of a name and a value"),
    (r"Error parsing (\S+): (.*)", lambda m, prog: f"{m[1]}: {m[2]}"),
)
"""Patterns of tyro's messages, and what is printed instead. The first pattern that matches counts."""
