"""JSON, YAML and TOML that someone else may have written: plain data, or an error of one line.

Beside what the formats themselves refuse, texts are refused that would need a deep recursion, or that stand for far
more than they show (aliases of aliases in YAML, endless keys in TOML). `printable` is what of a text may reach a
terminal, `short` what of a value may stand in a message.
"""

import json
import tomllib
from typing import Any

DEPTH = 100  # mappings and lists inside one another
ENTRIES = 50_000  # of a YAML text, aliases written out
DOTS = 500  # in a line of TOML


def from_json(content: str | bytes) -> Any:
    """Returns what a JSON text says.

    Raises:
        ValueError: it is none, is not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def from_toml(content: str | bytes) -> dict[str, Any]:
    """Returns what a TOML text says.

    Raises:
        ValueError: it is none, is not UTF-8, or nested too deeply.
    """
    text = _decoded(content)
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > DOTS:
            raise ValueError(f"line {number} has more than {DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_yaml(content: str | bytes) -> Any:
    """Returns what a YAML text says, with plain types alone.

    Raises:
        ValueError: it is none, is not UTF-8, gives a key twice, is nested too deeply, or stands for too much.
    """
    import yaml

    text = _decoded(content)
    try:
        _measure(text)
        return yaml.load(text, _loader())  # a safe loader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{place}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (RecursionError, OverflowError, TypeError) as error:
        raise ValueError(f"it is no plain YAML: {error}") from None


def _decoded(content: str | bytes) -> str:
    try:
        return content if isinstance(content, str) else content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def _measure(text: str) -> None:
    """Refuses a YAML text that is too deep or, its aliases written out, too large; the text is only scanned."""
    import yaml

    sizes: dict[str, int] = {}  # of what an anchor stands for
    open_ones: list[tuple[str | None, int]] = []  # anchor, entries before it
    entries = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            sizes |= {anchor: entries - before} if anchor else {}
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_ones):
                raise ValueError(f"the alias *{event.anchor} holds itself, line {event.start_mark.line + 1}")
            entries += sizes.get(event.anchor, 1)
        else:
            entries += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, entries - 1))
            if len(open_ones) > DEPTH:
                raise ValueError(f"it is nested more than {DEPTH} levels deep, line {event.start_mark.line + 1}")
        if entries > ENTRIES:
            raise ValueError(f"it has more than {ENTRIES:,} entries, with its aliases written out")


def _loader() -> type:
    """A safe loader that refuses a key given twice."""
    import yaml

    class Strict(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    value = self.construct_object(key, deep=True)
                    if value in seen:
                        line = node.start_mark.line + 1
                        raise ValueError(f"{value!r} is given twice in the mapping of line {line}")
                    seen.add(value)
            return super().construct_mapping(node, deep)

    return Strict
