"""The outcome of a study: one row per cell, as CSV, as a table of means, and as numbers that findings are judged by."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from granet.lab.rows import csv_of
from granet.text import columns

Measure = Literal["plasticity", "final_gap"]
MEASURES: dict[Measure, str] = {
    "plasticity": "plasticity: accuracy after retraining at the frozen learning rate, minus accuracy before pruning",
    "final_gap": "final gap: accuracy after the rest of the schedule, minus final accuracy of the unpruned network",
}
Curve = tuple[float, float, str]  # pretrained sparsity, pruning rate, arm


@dataclass(frozen=True)
class Row:
    """One cell: accuracies are shares of the test set, `plasticity` and `final_gap` their differences."""

    pretrained_sparsity: float
    seed: int
    step: int
    epoch: float
    lr: float
    rate: float
    arm: str
    scope: str
    density_before: float
    density: float
    accuracy_before: float
    accuracy_retrained: float
    plasticity: float
    accuracy_unpruned: float
    accuracy_final: float
    final_gap: float
    seconds: float

    @property
    def curve(self) -> Curve:
        """What the figures draw as one line."""
        return (self.pretrained_sparsity, self.rate, self.arm)


@dataclass(frozen=True)
class Table:
    """The rows of a study. `str(table)` is a table of means over moments and seeds, in points of accuracy.

    Attributes:
        name: name of the recipe.
        rows: one per cell.
        epochs: length of the normal schedule.
        drops: epochs at which the learning rate drops.
        retrain: k, in epochs.
        tested: number of test images that accuracies are measured on.
        missing: number of cells that are not finished.
    """

    name: str
    rows: tuple[Row, ...]
    epochs: int
    drops: tuple[float, ...]
    retrain: float
    tested: int
    missing: int = 0

    @property
    def seeds(self) -> list[int]:
        """The seeds."""
        return sorted({row.seed for row in self.rows})

    @property
    def arms(self) -> list[str]:
        """The arms, in their order."""
        return list(dict.fromkeys(row.arm for row in sorted(self.rows, key=lambda row: _ARMS.index(row.arm))))

    @property
    def rates(self) -> list[float]:
        """The pruning rates, ascending."""
        return sorted({row.rate for row in self.rows})

    @property
    def sparsities(self) -> list[float]:
        """The pretrained sparsities, ascending."""
        return sorted({row.pretrained_sparsity for row in self.rows})

    def phase(self, row: Row) -> int:
        """Returns how often the learning rate has dropped when the row is pruned."""
        return sum(row.epoch >= drop for drop in self.drops)

    def phases(self) -> list[int]:
        """Returns the phases that have moments of pruning."""
        return sorted({self.phase(row) for row in self.rows})

    def mean(self, measure: Measure, **wanted: Any) -> float | None:
        """Returns the mean of a measure in points over the rows with these values; None if there are none.

        ``phase=`` selects by phase, any other name by the row's field.
        """
        values = [100 * getattr(row, measure) for row in self.rows if self._is(row, wanted)]
        return statistics.fmean(values) if values else None

    def gain(self, measure: Measure, arm: str, over: str) -> dict[tuple[float, float, int, int], float]:
        """Returns by how many points one arm is above another, of cells that differ in nothing else.

        The keys are pretrained sparsity, pruning rate, step and seed.
        """
        values = {
            (row.arm, row.pretrained_sparsity, row.rate, row.step, row.seed): 100 * getattr(row, measure)
            for row in self.rows
        }
        return {
            key[1:]: x - values[over, *key[1:]]
            for key, x in values.items()
            if key[0] == arm and (over, *key[1:]) in values
        }

    def _is(self, row: Row, wanted: Mapping[str, Any]) -> bool:
        return all((self.phase(row) if key == "phase" else getattr(row, key)) == value for key, value in wanted.items())

    def per_seed(
        self, measure: Measure, key: Callable[[Row], Any], only: Callable[[Row], bool] = lambda row: True
    ) -> dict[Any, dict[int, float]]:
        """Returns means in points, by ``key`` and seed."""
        groups: dict[Any, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in filter(only, self.rows):
            groups[key(row)][row.seed].append(100 * getattr(row, measure))
        return {name: {seed: statistics.fmean(v) for seed, v in seeds.items()} for name, seeds in groups.items()}

    def __str__(self) -> str:
        phases = self.phases()
        lrs = {phase: {row.lr for row in self.rows if self.phase(row) == phase} for phase in phases}
        labels = [f"lr {next(iter(lrs[p])):g}" if len(lrs[p]) == 1 else f"phase {p}" for p in phases]
        head = ["pretrained", "rate", "arm", "density"]
        head += [f"plasticity, {label}" for label in labels] + [f"gap, {label}" for label in labels]
        body = []
        for sparsity in self.sparsities:
            for rate in self.rates:
                for arm in self.arms:
                    wanted = {"pretrained_sparsity": sparsity, "rate": rate, "arm": arm}
                    rows = [row for row in self.rows if self._is(row, wanted)]
                    if not rows:
                        continue
                    means = [self.mean(m, phase=phase, **wanted) for m in MEASURES for phase in phases]
                    density = f"{statistics.fmean(row.density for row in rows):.2%}"
                    body.append([f"{sparsity:g}", f"{rate:g}", arm, density, *map(points, means)])
        return columns([head, *body], right=range(3, len(head)))

    def to_csv(self, path: str | Path | None = None) -> str:
        """Returns the rows as CSV, and writes them to ``path`` if one is given."""
        return csv_of(Row, self.rows, path)


_ARMS = ("none", "restore", "equal")


def points(value: float | None) -> str:
    """Returns points of accuracy as text, with their sign; what rounds to zero has a plus.

    >>> points(1.234), points(-0.001), points(None)
    ('+1.23', '+0.00', '-')
    """
    return "-" if value is None else f"{value:+z.2f}"


def table(name: str, results: Iterable[Mapping[str, Any]], **about: Any) -> Table:
    """Returns the table of the cells' results, in the order of seeds, sparsities, moments, rates and arms."""
    rows = [Row(**result) for result in results]
    rows.sort(key=lambda row: (row.seed, row.pretrained_sparsity, row.step, row.rate, _ARMS.index(row.arm)))
    return Table(name, tuple(rows), **about)
