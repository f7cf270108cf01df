"""Names that users write: what to say of one that there is not."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The end of a message: the choice that is spelt most like what was given, or nothing where none is.

    >>> print("no layer 'con1'" + did_you_mean("con1", ["conv1", "fc"]))
    no layer 'con1'; did you mean 'conv1'?
    """
    near = get_close_matches(str(given), list(choices), 1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != given else ""


def unknown(kind: str, given: object, choices: Iterable[str]) -> str:
    """The message for a name of some kind that is not among the choices."""
    choices = list(choices)
    return f"unknown {kind} {given!r}: choose from {', '.join(choices)}{did_you_mean(given, choices)}"
