"""Settings of a sweep given beside its file, as on the command line: in place of those of its grid and its methods."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from granet.lab.sweep.grid import Sweep
from granet.parsing import from_yaml
from granet.train.recipe import SECTIONS, Data, Model, Train

FIELDS = {"data": (Data,), "model": (Model,), "train": (Train,), "method": tuple(SECTIONS.values())}
FLAGS = sorted(
    {f"--{at}.{name}".replace("_", "-") for at, kinds in FIELDS.items() for kind in kinds for name in kind.model_fields}
)
SETTING = re.compile(rf"--({'|'.join(FIELDS)})\.[\w-]+")
LONGEST = 80  # of what a name says of the settings


def split(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the words without those that set something, and what they set: a key, and the words behind it.

    >>> split(["digits", "--train.epochs", "3", "--jobs", "2", "--method.sparsity=0.8", "0.9"])
    (['digits', '--jobs', '2'], {'train.epochs': ['3'], 'method.sparsity': ['0.8', '0.9']})
    """
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    key = None
    for word in words:
        flag, equals, value = word.partition("=")
        if SETTING.fullmatch(flag):
            key = flag[2:].replace("-", "_")
            found[key] = [value] if equals else []
        elif key is None or word.startswith("--"):
            key = None
            rest.append(word)
        else:
            found[key].append(word)
    return rest, found


def laid_over(sweep: Sweep, settings: Mapping[str, Sequence[str]], seeds: Sequence[int] = ()) -> Sweep:
    """Returns the sweep with these settings for all of its methods; several values of one make a cell each.

    Its name says what is set, so that its tables do not take the place of those of the sweep as it is. A setting that
    is itself a list, such as ``train.milestones``, has the values as its elements.

    Args:
        sweep: the sweep as its file has it.
        settings: values as they are written in YAML (or ``None``, as in Python), by key such as ``train.epochs``.
        seeds: in place of those of the sweep.

    Raises:
        ValueError: a setting has no value, or one that is no YAML.
    """
    if not settings and not seeds:
        return sweep
    values: dict[str, Any] = sweep.model_dump()
    for key, texts in settings.items():
        if not texts:
            raise ValueError(f"--{key.replace('_', '-')} needs a value")
        section, _, name = key.partition(".")
        given = [None if text == "None" else from_yaml(text) for text in texts]
        fields = [kind.model_fields[name] for kind in FIELDS[section] if name in kind.model_fields]
        is_list = any(get_origin(field.annotation) is tuple for field in fields)
        values["grid"][section][name] = [given] if is_list else given if len(given) > 1 else given[0]
        for entry in values["methods"]:
            entry[section].pop(name, None)
    values["seeds"] = list(seeds) or values["seeds"]
    said = [f"{key}={'+'.join(texts)}" for key, texts in settings.items() if key != "data.root"]
    said += [f"seeds={'+'.join(map(str, seeds))}"] if seeds else []
    text = re.sub(r"[^\w.,=+%-]", "_", ",".join(said))
    short = text if len(text) <= LONGEST else hashlib.sha256(text.encode()).hexdigest()[:8]
    values["name"] = ",".join([sweep.name, *filter(None, [short])])
    return Sweep.model_validate(values)
