"""The table of a sweep: one row per method and setting, with a note wherever conditions were not equal."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from granet.lab.rows import csv_text
from granet.lab.sweep.grid import Sweep
from granet.lab.sweep.run import Done
from granet.text import columns, duration, markdown_table


@dataclass(frozen=True)
class Row:
    """The finished runs of one method with one setting, over the seeds."""

    task: str
    label: str
    settings: tuple[tuple[str, Any], ...]  # the varied keys
    runs: tuple[Done, ...]
    wanted: int  # runs that the sweep asks for
    steps: int  # that the runs of this recipe have in common
    differs: tuple[str, ...]

    @property
    def target(self) -> float | None:
        """The sparsity asked for, None where the method is asked for none."""
        return self.runs[0].cell.at("method.sparsity")

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense network."""
        return self.runs[0].cell.recipe.method.name == "dense"

    def accuracies(self, select: str) -> list[float]:
        """Returns the test accuracies of the ``last`` or the ``best`` weights, for the runs that have them."""
        scores = [run.summary[select] for run in self.runs]
        return [score["test_accuracy"] for score in scores if score is not None]

    def mean(self, what) -> float:
        """Returns the mean of ``what(summary)``."""
        return statistics.mean(what(run.summary) for run in self.runs)

    @cached_property
    def sparsity(self) -> float:
        """The sparsity reached."""
        return self.mean(lambda summary: summary["sparsity"])

    @cached_property
    def inference(self) -> float:
        """FLOPs of inference, as a share of the dense network's."""
        return self.mean(lambda summary: summary["flops"]["inference"] / summary["flops"]["inference_dense"])

    @cached_property
    def training(self) -> float:
        """FLOPs of training, as a share of a dense network's in the steps that the runs have in common."""
        return self.mean(lambda summary: training(summary, self.steps))

    @property
    def exploration(self) -> float | None:
        """R_s, the share of sparse weights that were ever active; None for runs of a version that kept none."""
        if any("exploration" not in run.summary for run in self.runs):
            return None
        return self.mean(lambda summary: summary["exploration"])


def training(summary, steps: int) -> float:
    """Returns the training FLOPs of a run as a share of a dense network's in so many steps."""
    flops = summary["flops"]
    return flops["training"] / (flops["training_dense"] / summary["steps"] * steps)


def rows(sweep: Sweep, done: Iterable[Done]) -> list[Row]:
    """Returns the rows of the table for the finished runs, ordered by recipe, sparsity, other settings and method."""
    done = list(done)
    labels = [entry.title for entry in sweep.methods]
    groups: dict[tuple, list[Done]] = {}
    for one in done:
        settings = tuple((key, one.cell.at(key)) for key in sweep.varied)
        groups.setdefault((one.cell.task, one.cell.label, repr(settings)), []).append(one)
    common: dict[tuple, int] = {}  # the fewest steps of those runs that no setting of their own sets apart
    for one in sorted(
        (one for one in done if one.summary), key=lambda one: (one.cell.apart != (), one.summary["steps"])
    ):
        common.setdefault(_common(sweep, one), one.summary["steps"])
    table = []
    for (task, label, _), group in groups.items():
        finished = tuple(sorted((one for one in group if one.summary), key=lambda one: one.cell.recipe.seed))
        if finished:
            steps = common[_common(sweep, finished[0])]
            settings = tuple((key, finished[0].cell.at(key)) for key in sweep.varied)
            differs = tuple(_differs(finished, len(group), steps))
            table.append(Row(task, label, settings, finished, len(group), steps, differs))

    def order(row: Row):
        others = [_rank(sweep, key, value) for key, value in row.settings if key != "method.sparsity"]
        sparsity = row.target if row.target is not None else -1.0 if row.is_dense else 2.0
        return sweep.recipe.index(row.task), sparsity, others, labels.index(row.label)

    return sorted(table, key=order)


def _rank(sweep: Sweep, key: str, value: Any) -> int:
    values = sweep.grid.axes.get(key, ())
    return values.index(value) if value in values else len(values)


def _common(sweep: Sweep, one: Done) -> tuple:
    """Returns what runs with equally many steps have in common: the recipe, and the settings from the grid."""
    keys = [key for key, values in sweep.grid.axes.items() if len(values) > 1 and not key.startswith("method.")]
    return one.cell.task, tuple(repr(one.cell.at(key)) for key in keys)


def _differs(runs: Sequence[Done], wanted: int, steps: int) -> Iterable[str]:
    """Yields what keeps the runs of a line from being compared with the others as they are."""
    yield from runs[0].cell.apart
    longer = sorted({run.summary["steps"] for run in runs} - {steps})
    if longer and not runs[0].cell.apart:
        yield f"{' or '.join(f'{n:,}' for n in longer)} steps instead of {steps:,}"
    if len(runs) < wanted:
        yield f"{len(runs)} of {wanted} runs are finished"
    lacking = sum(run.summary["best"] is None for run in runs)
    if lacking:
        yield f"{lacking} of {len(runs)} runs have no best: never evaluated at the target sparsity"


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    """Returns mean and standard deviation in per cent.

    >>> spread([0.88, 0.9]), spread([0.9]), spread([])
    ('89.00 ± 1.41', '90.00', '-')
    """
    if not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def per_cent(share: float | None) -> str:
    """Returns a share in per cent without idle zeros.

    >>> per_cent(0.9), per_cent(0.97306), per_cent(None)
    ('90%', '97.31%', '-')
    """
    return "-" if share is None else f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def cells_of(sweep: Sweep, table: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    """Returns the table as text, headings first, and its footnotes."""
    notes = list(dict.fromkeys(note for row in table for note in row.differs))
    several = len(sweep.recipe) > 1
    others = [key for key in sweep.varied if key != "method.sparsity"]
    head = ["recipe"] * several + ["method", "sparsity", *others, "active", "test %, last", "test %, best"]
    head += ["inference \N{MULTIPLICATION SIGN}", "training \N{MULTIPLICATION SIGN}", "R_s", "time", "n", "differs"]
    body = []
    for row in table:
        active = row.mean(lambda summary: summary["parameters"]["active"])
        values = dict(row.settings)
        line = [row.task] * several + [row.label, "" if row.is_dense else per_cent(row.sparsity)]
        line += ["" if values[key] is None else str(values[key]) for key in others]
        line += [f"{active:,.0f}", spread(row.accuracies("last")), spread(row.accuracies("best"))]
        line += [f"{row.inference:.3f}", f"{row.training:.3f}"]
        line += ["-" if row.exploration is None else f"{row.exploration:.3f}"]
        line += [duration(row.mean(lambda summary: summary["seconds"])), str(len(row.runs))]
        line += [" ".join(f"[{notes.index(note) + 1}]" for note in row.differs)]
        body.append(line)
    return [head, *body], [f"[{i}] {note}" for i, note in enumerate(notes, 1)]


def text(sweep: Sweep, table: Sequence[Row]) -> str:
    """Returns the table for the terminal."""
    lines, notes = cells_of(sweep, table)
    left = len(sweep.recipe) > 1
    return "\n".join([columns(lines, right=range(1 + left, len(lines[0]) - 1)), *notes])


def markdown(sweep: Sweep, table: Sequence[Row]) -> str:
    """Returns the page in Markdown: how the runs were made, the table, its footnotes, the gaps asked for."""
    lines, notes = cells_of(sweep, table)
    left = 1 + (len(sweep.recipe) > 1)
    parts = [f"# {sweep.name}", about(sweep), markdown_table(lines, right=range(left, len(lines[0])))]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    found = gaps(sweep, table)
    if found:
        parts.append(f"## Gaps\n\n{RULE.format(select=sweep.report.select)}\n\n" + "\n".join(f"- {g}" for g in found))
    return "\n\n".join(parts) + "\n"


RULE = (
    "Gap in points of test accuracy ({select} weights), with its standard error; only a gap of more than "
    "two standard errors is called a difference."
)


def about(sweep: Sweep) -> str:
    """Returns a paragraph on how the runs were made."""
    seeds = ", ".join(map(str, sweep.seeds))
    return (
        f"Recipe {', '.join(sweep.recipe)}; mean and standard deviation over the seeds {seeds}. The runs of a recipe "
        "have the same number of steps, the same data in the same order for a seed, and the same rule of selection; "
        "the column “differs” names what was not equal. FLOPs are relative to dense training of as many steps. R_s is "
        "the share of sparse weights that were ever active."
    )


def runs_csv(sweep: Sweep, done: Iterable[Done]) -> str:
    """Returns all finished runs as CSV, one per line."""
    done = [one for one in done if one.summary]
    steps = {run.run.path: row.steps for row in rows(sweep, done) for run in row.runs}
    others = [key for key in sweep.varied if key != "method.sparsity"]
    head = ["recipe", "method", "target_sparsity", *others, "seed", "sparsity", "active", "last_test", "best_test"]
    head += ["last_validation", "best_validation", "inference_ratio", "training_ratio", "exploration", "steps"]
    head += ["seconds", "differs", "run"]
    lines = []
    for one in done:
        summary, best, last = one.summary, one.summary["best"] or {}, one.summary["last"]
        flops = summary["flops"]
        line = [one.cell.task, one.cell.label, one.cell.at("method.sparsity"), *(one.cell.at(key) for key in others)]
        line += [one.cell.recipe.seed, summary["sparsity"], summary["parameters"]["active"], last["test_accuracy"]]
        line += [best.get("test_accuracy"), last["validation_accuracy"], best.get("validation_accuracy")]
        line += [flops["inference"] / flops["inference_dense"], training(summary, steps[one.run.path])]
        line += [summary.get("exploration"), summary["steps"], summary["seconds"], "; ".join(one.cell.apart)]
        lines.append([*line, one.run.path.name])
    return csv_text(head, lines)


@dataclass(frozen=True)
class Gap:
    """The difference of two methods at one setting, in points of accuracy."""

    ours: str
    other: str
    where: str
    points: float
    error: float | None  # standard error of the difference; None with a single seed

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` beyond two standard errors, else ``no clear difference``."""
        if self.error is None:
            return "one seed says nothing about this"
        if abs(self.points) <= 2 * self.error:
            return "no clear difference"
        return "better" if self.points > 0 else "worse"

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.where}: {self.ours} - {self.other} = {self.points:+.2f}{error}: {self.verdict}"


def gap(ours: Row, other: Row, select: str = "last") -> Gap | None:
    """Returns the gap between two lines of the table, None where one has no such accuracies."""
    a, b = ours.accuracies(select), other.accuracies(select)
    if not a or not b:
        return None
    points = 100 * (statistics.mean(a) - statistics.mean(b))
    error = None
    if min(len(a), len(b)) > 1:
        error = 100 * (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    shared = [
        f"{key} {x}" if y in (x, None) else f"{key} {x} against {y}"
        for (key, x), (_, y) in zip(ours.settings, other.settings, strict=True)
        if key != "method.sparsity" and x is not None
    ]
    where = ", ".join([ours.task, per_cent(ours.target if ours.target is not None else ours.sparsity), *shared])
    return Gap(ours.label, other.label, where, points, error)


def gaps(sweep: Sweep, table: Sequence[Row]) -> list[Gap]:
    """Returns the gaps of the pairs that the sweep compares, wherever both have the same setting; dense fits any.

    Settings of the method itself may differ; the gap then names them.
    """
    found = [
        gap(a, b, sweep.report.select)
        for ours, other in sweep.report.compare
        for a in table
        for b in table
        if (a.label, b.label) == (ours, other) and _comparable(a, b)
    ]
    return [one for one in found if one is not None]


def _comparable(a: Row, b: Row) -> bool:
    same = a.target == b.target or a.is_dense or b.is_dense
    pairs = zip(a.settings, b.settings, strict=True)
    rest = all(x == y for (key, x), (_, y) in pairs if not key.startswith("method."))
    return a.task == b.task and same and rest
