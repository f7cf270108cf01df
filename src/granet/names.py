"""Messages for unknown names, and the prefixes that wrappers put before the names of parameters."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches


def nearest(given: object, choices: Iterable[str], most: int = 1) -> list[str]:
    """Returns the choices that are spelt most like what was given, the nearest first: at most `most`, perhaps none.

    >>> nearest("con1", ["conv1", "conv2", "fc"], 3)
    ['conv1', 'conv2']
    """
    return get_close_matches(str(given)[:100], list(choices), most, cutoff=0.5)


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """Returns the end of a message: the choice nearest to what was given, or nothing where none is near.

    >>> print("no layer 'con1'" + did_you_mean("con1", ["conv1", "fc"]))
    no layer 'con1'; did you mean 'conv1'?
    """
    near = nearest(given, choices)
    return f"; did you mean {near[0]!r}?" if near and near[0] != given else ""


def unknown(kind: str, given: object, choices: Iterable[str]) -> str:
    """Returns the message for a name of some kind that is not among the choices."""
    choices = list(choices)
    return f"unknown {kind} {given!r}: choose from {', '.join(choices)}{did_you_mean(given, choices)}"


def described(value: object) -> str:
    """What was given, in a message that asks for something else.

    >>> described("0.9"), described(None), described(int), described([1])
    ("the text '0.9'", 'None', 'the class int', 'a list')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, bool | int | float):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of names that torch puts in


def forms(name: str) -> Iterator[str]:
    """The names that a parameter may have in the model itself, the likeliest first: what wrappers put in is left out.

    >>> list(forms("module._orig_mod.module.weight"))
    ['module._orig_mod.module.weight', 'module.module.weight', 'module.weight', 'weight']
    """
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    yield name
    if bare != name:
        yield bare
    while bare.startswith("module."):
        bare = bare.removeprefix("module.")
        yield bare


def matched(wanted: Iterable[str], among: Iterable[str]) -> dict[str, str]:
    """For each name that is wanted the one of `among` that means the same, wrappers on either side left out.

    Names that are equal go first. One that has no counterpart is missing in what comes back.

    >>> matched(["0.weight", "1.weight"], ["module._orig_mod.0.weight", "other"])
    {'0.weight': 'module._orig_mod.0.weight'}
    """
    wanted, among = list(wanted), list(among)
    known = set(among)
    if known.issuperset(wanted):
        return {name: name for name in wanted}
    meaning: dict[str, str] = {}
    steps = [list(forms(name)) for name in among]
    for depth in range(max(map(len, steps), default=0)):
        for name, step in zip(among, steps, strict=True):
            if depth < len(step):
                meaning.setdefault(step[depth], name)
    pairs = ((name, next((meaning[form] for form in forms(name) if form in meaning), None)) for name in wanted)
    return {name: other for name, other in pairs if other is not None}
