"""Which runs can be set side by side, and what differs between them: read from their recipes.

Runs are alike if they have data, held-out share, model, epochs and batch size in common. Only then do accuracies and
FLOPs say something about the methods; any other difference is named beside the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from granet.parsing import printable

if TYPE_CHECKING:
    from granet.report.page import RunData

TASK = ("data.name", "data.validation", "model.name", "train.epochs", "train.batch_size")
APART = (  # no difference of the training: names, places, what is measured when; and what a method is
    "name", "data.root", "model.pattern", "train.log", "train.evaluate", "train.checkpoint", "train.keep",
    "train.threads", "train.device",
)  # fmt: skip


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a recipe by key.

    >>> flat({"seed": 0, "train": {"lr": 0.1}})
    {'seed': 0, 'train.lr': 0.1}
    """
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        inner = value.items() if isinstance(value, Mapping) else None
        found |= {key: value} if inner is None else {f"{key}.{name}": x for name, x in inner}
    return found


def task(run: "RunData") -> tuple[str, ...]:
    """Returns what runs must have in common to be compared, as text."""
    settings = flat(run.settings)
    return tuple(printable(str(settings.get(key))) for key in TASK)


def title(run: "RunData") -> str:
    """Returns the task of a run in words."""
    data, validation, model, epochs, batch = task(run)
    return f"{data} ({validation} held out), {model}, {epochs} epoch{'s' * (epochs != '1')} in batches of {batch}"


def groups(runs: Mapping[str, "RunData"]) -> list[dict[str, "RunData"]]:
    """Returns the runs by label, those together that can be compared, in the order in which they are given."""
    found: dict[tuple[str, ...], dict[str, RunData]] = {}
    for label, run in runs.items():
        found.setdefault(task(run), {})[label] = run
    return list(found.values())


def differences(group: Mapping[str, "RunData"]) -> dict[str, str]:
    """Returns for each run what it has otherwise than others of its group, its method aside, such as ``seed 1``."""
    settings = {label: flat(run.settings) for label, run in group.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    varied = [key for key in keys if _counts(key) and len({repr(values.get(key)) for values in settings.values()}) > 1]
    return {
        label: printable(", ".join(f"{key.rpartition('.')[2]} {values.get(key)}" for key in varied))
        for label, values in settings.items()
    }


def _counts(key: str) -> bool:
    return key not in APART and not key.startswith("method")


def pair(group: Mapping[str, "RunData"]) -> tuple[str | None, str | None]:
    """Returns the labels of the run that a headline is of and of its dense twin; None where there is no such run.

    It is the first finished sparse run that has a twin: a finished dense run that differs in nothing but the method, or
    else only in its seed. Without any twin, the first finished sparse run, else the first finished run.
    """
    finished = {label: run for label, run in group.items() if run.summary}
    sparse = [label for label, run in finished.items() if not run.is_dense]
    dense = [label for label, run in finished.items() if run.is_dense]
    for aside in ((), ("seed",)):
        for label in sparse:
            for twin in dense:
                if set(_differing(finished[label], finished[twin])) <= set(aside):
                    return label, twin
    return next(iter([*sparse, *dense]), None), None


def _differing(one: "RunData", other: "RunData") -> Iterator[str]:
    a, b = flat(one.settings), flat(other.settings)
    return (key for key in {**a, **b} if _counts(key) and a.get(key) != b.get(key))


def blocks(widths: Sequence[int], width: int, gap: int) -> list[list[int]]:
    """Returns the columns that are shown together where not all fit: each block repeats the first column.

    >>> blocks([10, 5, 5, 5], width=25, gap=2)
    [[0, 1, 2], [0, 3]]
    """
    found: list[list[int]] = [[0]]
    room = width - widths[0]
    for column, need in enumerate(widths[1:], 1):
        if need + gap > room and len(found[-1]) > 1:
            found.append([0])
            room = width - widths[0]
        found[-1].append(column)
        room -= need + gap
    return found
