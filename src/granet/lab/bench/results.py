"""What `granet bench` found, as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Any

from granet.lab.bench.layers import Layers
from granet.lab.bench.measuring import Latency
from granet.text import columns, markdown_table, si

HEADINGS = ["engine", "precision", "min ms", "p50", "p90", "p99", "per s", "weights", "error", "accuracy", "ratio"]
WIDTH = 100  # of the text, in characters
EXPLANATIONS = {
    "min ms": "shortest time of a call, in milliseconds",
    "p50": "median of the calls, in milliseconds",
    "p90": "nine of ten calls took no longer, in milliseconds",
    "p99": "99 of 100 calls took no longer, in milliseconds",
    "per s": "examples per second of all streams together",
    "weights": "bytes of the weights: packed ones with their indices (granet), of the file (ONNX Runtime, OpenVINO), "
    "of the tensors (torch)",
    "error": "difference to torch in float32: of the largest value in float32, of the root mean square otherwise",
    "accuracy": "share of the run's test images that are classified correctly",
    "ratio": "shortest time of the fastest dense engine, of all precisions, divided by that of the row",
}


@dataclass(frozen=True)
class Row:
    """An engine at a precision.

    Attributes:
        engine: its name.
        precision: what it computes in.
        sparse: whether it makes use of zeros.
        latency: the times of a call.
        rate: examples per second of all streams together.
        nbytes: bytes of the weights.
        error: the difference to torch in float32.
        accuracy: the share of test images classified correctly; None where there are none.
        note: what else is to be known.
    """

    engine: str
    precision: str
    sparse: bool
    latency: Latency
    rate: float
    nbytes: int
    error: float
    accuracy: float | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.engine} in {self.precision}"


@dataclass(frozen=True)
class SideBySide:
    """Engines side by side. `str()` gives a table.

    Attributes:
        name: what the user called the model.
        about: the model, in words.
        machine: the machine and the settings of the measurement, in words.
        rows: the engines that were measured.
        left_out: the engine, precision and reason of those that were not.
        images: the number of test images for the accuracy.
        streams: the number of sessions at the same time.
        layers: the layers of granet's fastest compiled network, if they were asked for and one runs sparse.
        not_saved: why the compiled network that was to be saved was not, in words; empty if it was or need not be.
    """

    name: str
    about: str
    machine: str
    rows: tuple[Row, ...]
    left_out: tuple[tuple[str, str, str], ...] = ()
    images: int = 0
    streams: int = 1
    layers: Layers | None = None
    not_saved: str = ""

    @property
    def fastest_dense(self) -> Row:
        """The fastest of the engines that make no use of zeros, granet's own dense fallback aside."""
        return min((row for row in self.rows if row.engine != "granet"), key=lambda row: row.latency.least)

    def ratio(self, row: Row) -> float:
        """Returns how many times as fast as the fastest dense engine it is."""
        return self.fastest_dense.latency.least / row.latency.least

    @property
    def verdict(self) -> str:
        """Whether the sparse network wins, in a sentence."""
        ours = [row for row in self.rows if row.engine == "granet"]
        dense = self.fastest_dense
        if not ours:
            return f"The sparse network was not measured on granet's kernels; the fastest dense engine is {dense}."
        sparse = [row for row in ours if row.sparse]
        if not sparse:
            return (
                f"The sparse network does not win: granet found no kernels that gain and runs the dense model; the "
                f"fastest dense engine is {dense}."
            )
        best = min(sparse, key=lambda row: row.latency.least)
        ratio = self.ratio(best)
        if best.latency.is_faster_than(dense.latency):
            return f"The sparse network wins: {best} is {ratio:.2f} times as fast as the fastest dense engine, {dense}."
        if dense.latency.is_faster_than(best.latency):
            return (
                f"The sparse network does not win: {best} has {ratio:.2f} times the speed of the fastest dense "
                f"engine, {dense}."
            )
        return f"The sparse network does not win: {best} and the fastest dense engine, {dense}, are equally fast."

    def reason(self, engine: str, precision: str) -> str:
        """Returns why an engine was left out."""
        return next((why for *who, why in self.left_out if who == [engine, precision]), "it was not asked for")

    def cells(self) -> list[list[str]]:
        """Returns the rows of the table, headings first, without the columns that nothing is known for."""
        rows = [HEADINGS]
        for row in self.rows:
            times = [ms(getattr(row.latency, key)) for key in ("least", "p50", "p90", "p99")]
            accuracy = "" if row.accuracy is None else f"{row.accuracy:.2%}"
            size, ratio = f"{si(row.nbytes)}B", f"{self.ratio(row):.2f}x"
            rows.append(
                [row.engine, row.precision, *times, f"{si(row.rate)}", size, f"{row.error:.1e}", accuracy, ratio]
            )
        kept = [i for i, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
        return [[row[i] for i in kept] for row in rows]

    @property
    def _right(self) -> range:
        return range(2, len(self.cells()[0]))

    def notes(self) -> list[str]:
        """Returns what is to be said below the table, in sentences."""
        notes = [f"{row.engine}, {row.precision}: {row.note}" for row in self.rows if row.note]
        reasons: dict[tuple[str, str], list[str]] = {}
        for engine, precision, reason in self.left_out:
            reasons.setdefault((engine, reason), []).append(precision)
        for (engine, reason), precisions in reasons.items():
            notes.append(f"left out: {engine} in {', '.join(precisions)}: {reason}")
        if self.images:
            notes.append(f"accuracy on {self.images:,} test images")
        return notes

    def __str__(self) -> str:
        texts = [f"{self.name}: {self.about}", self.machine], [*self.notes(), self.verdict]
        above, below = ([line for text in part for line in textwrap.wrap(text, WIDTH)] for part in texts)
        lines = [*above, "", columns(self.cells(), right=self._right), "", *below]
        if self.layers is not None:
            notes = [line for text in self.layers.notes() for line in textwrap.wrap(text, WIDTH)]
            lines += ["", f"layers of granet in {self.layers.precision}:", "", str(self.layers), "", *notes]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Returns the same in Markdown."""
        lines = [
            f"**{self.name}**: {self.about}. {self.machine}.",
            "",
            markdown_table(self.cells(), right=self._right),
            "",
        ]
        lines += [*(f"- {note}" for note in self.notes()), "", self.verdict]
        if self.layers is not None:
            table = markdown_table(self.layers.cells(), right=self.layers.right)
            lines += ["", f"Layers of granet in {self.layers.precision}:", "", table, "", *self.layers.notes()]
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Returns everything in numbers, texts, lists and mappings, as JSON has them."""
        found = dataclasses.asdict(self)
        for row, values in zip(self.rows, found["rows"], strict=True):
            values["ratio"] = self.ratio(row)
        found["left_out"] = [dict(zip(("engine", "precision", "reason"), one, strict=True)) for one in self.left_out]
        return found | {"fastest_dense": str(self.fastest_dense), "verdict": self.verdict}

    def json(self) -> str:
        """Returns the same as JSON."""
        return json.dumps(self.values(), indent=2)


def ms(milliseconds: float) -> str:
    """Returns milliseconds in at most three digits behind the point, in six characters where that is possible."""
    return f"{milliseconds:.{max(0, min(3, 5 - len(str(int(milliseconds)))))}f}"
