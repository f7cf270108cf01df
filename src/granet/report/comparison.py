"""Which runs can be compared, and what differs between them, as their recipes and summaries say.

Runs can be compared if they have the data, the held-out share, the model, the epochs and the batch size in common.
Only then do accuracies and FLOPs say something about the methods. Any other difference is named beside the run, a
different number of training steps among them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from granet.text import printable

if TYPE_CHECKING:
    from granet.report.rundata import RunData

TASK = ("data.name", "data.validation", "model.name", "train.epochs", "train.batch_size")
APART = (  # settings that do not change the training, and the pattern, which belongs to the method
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
    """Returns the groups of runs that can be compared, by label, in the order in which the runs are given."""
    found: dict[tuple[str, ...], dict[str, RunData]] = {}
    for label, run in runs.items():
        found.setdefault(task(run), {})[label] = run
    return list(found.values())


def differences(group: Mapping[str, "RunData"]) -> dict[str, str]:
    """Returns for each run the settings in which the runs of a group differ, such as `seed 1`, apart from the method.

    Finished runs with different numbers of steps had different budgets, which is said as well: `1,200 steps`.
    """
    settings = {label: flat(run.settings) for label, run in group.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    varied = [key for key in keys if _counts(key) and len({repr(values.get(key)) for values in settings.values()}) > 1]
    steps = {label: run.summary["steps"] for label, run in group.items() if run.summary}
    budgets = {label: f"{n:,} steps" for label, n in steps.items()} if len(set(steps.values())) > 1 else {}
    found = {}
    for label, values in settings.items():
        parts = [f"{key.rpartition('.')[2]} {values.get(key)}" for key in varied]
        found[label] = printable(", ".join([*parts, *([budgets[label]] if label in budgets else [])]))
    return found


def _counts(key: str) -> bool:
    return key not in APART and not key.startswith("method")


def pair(group: Mapping[str, "RunData"], subject: str | None = None) -> tuple[str | None, str | None]:
    """Returns the labels of the run that a headline is about and of its dense twin, None where there is none.

    A twin is a finished dense run that differs from the run in nothing but the method, or else only in its seed.

    Args:
        group: Runs that can be compared, by label.
        subject: The run that the headline is about. If the group has no such finished run, it is the first finished
            sparse run that has a twin; without any twin, the first finished sparse run, else the first finished run.
    """
    finished = {label: run for label, run in group.items() if run.summary}
    dense = [label for label, run in finished.items() if run.is_dense]
    candidates = [label for label in finished if label not in dense]
    if subject in finished:
        candidates, dense = [subject], [label for label in dense if label != subject]
    for aside in ((), ("seed",)):
        for label in candidates:
            for twin in dense:
                if set(_differing(finished[label], finished[twin])) <= set(aside):
                    return label, twin
    return next(iter([*candidates, *dense]), None), None


def _differing(one: "RunData", other: "RunData") -> Iterator[str]:
    a, b = flat(one.settings), flat(other.settings)
    return (key for key in {**a, **b} if _counts(key) and a.get(key) != b.get(key))


def blocks(widths: Sequence[int], width: int, gap: int) -> list[list[int]]:
    """Returns the columns that are shown together if not all fit beside one another; each block repeats the first.

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
