"""Reports of what was measured and chosen; they print as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from granet.engine.timing import Spread
from granet.text import columns

DENSE, SPARSE = "dense", "sparse"  # the variants of the whole model that are timed, in the format of the inputs
OTHER_FORMAT = "dense, other format"  # float32 without the kernels in the other memory format


@dataclass(frozen=True)
class LayerReport:
    """The measured milliseconds of one layer, and what was chosen for which reason."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense_ms: float | None
    sparse_ms: float | None
    chosen: str
    why: str


def layer_table(layers: Sequence[LayerReport]) -> str:
    """Returns a table as text, with one row per layer."""
    rows = [["layer", "weight", "density", "dense ms", "sparse ms", "chosen"]]
    for row in layers:
        times = ["-" if ms is None else f"{ms:.3f}" for ms in (row.dense_ms, row.sparse_ms)]
        rows.append([row.name, "x".join(map(str, row.shape)), f"{row.density:.1%}", *times, f"{row.chosen}: {row.why}"])
    return columns(rows, right=(2, 3, 4))


@dataclass(frozen=True)
class InferenceReport:
    """The measurements and choices of `compile`. `str()` gives a table.

    Attributes:
        layers: one row per convolution or linear layer.
        dense_ms: milliseconds of the whole model on torch's kernels.
        fast_ms: milliseconds of the whole model as compiled.
        chosen: what the compiled model runs: "sparse" or "dense".
        why: the reason in words.
        error: the largest difference to the dense output, relative to that output's largest value; at reduced
            precision the root mean square of the differences, relative to that of the output.
        nbytes: bytes of packed weights and their index structures.
        arena_nbytes: bytes of working memory for one call.
        precision: what the compiled model computes in, "float32" if it is the dense model. The dense milliseconds are
            always those of float32.
        others: milliseconds of other ways to run the dense model, by name: in the other memory format, and at reduced
            precision under bfloat16 autocast. The compiled model runs only if it is faster than all of them.
        fill: at reduced precision, the share of active weights in the stored words of channels, with the channels as
            they are in the model and as they were renumbered.
        machine: the processor, instruction set and threads of the measurement, where it was another process's.
    """

    layers: tuple[LayerReport, ...]
    dense_ms: float
    fast_ms: float
    chosen: str
    why: str
    error: float
    nbytes: int = 0
    arena_nbytes: int = 0
    precision: str = "float32"
    others: Mapping[str, float] = field(default_factory=dict)
    fill: tuple[float, float] | None = None
    machine: str = ""

    def __str__(self) -> str:
        name = "compiled" if self.precision == "float32" else f"compiled to {self.precision}"
        measure = "largest" if self.precision == "float32" else "root mean square"
        whole = (
            f"whole model: dense {self.dense_ms:.2f} ms, {name} {self.fast_ms:.2f} ms "
            f"({self.dense_ms / max(self.fast_ms, 1e-9):.2f}x), runs {self.chosen}: {self.why}; "
            f"{measure} relative difference {self.error:.1e}"
        )
        for other, ms in self.others.items():
            whole += f"; {other} {ms:.2f} ms"
        if self.fill is not None:
            before, after = self.fill
            whole += f"; {after:.0%} of the stored weights are active"
            whole += f" ({before:.0%} before channels were renumbered)" if after > before else ""
        if self.machine:
            whole += f"; measured on {self.machine}"
        return f"{layer_table(self.layers)}\n{whole}"


@dataclass(frozen=True)
class TrainingReport:
    """The measurements and choices of `accelerate`. `str()` gives a table.

    Attributes:
        layers: one row for every module that has parameters, at the density it had when measured; its milliseconds are
            those of forward and backward together. A layer that was not measured says why.
        why: the reason for the choice about the whole model, in words.
        whole: wall times of the whole model's forward and backward, if they were measured: "dense", "sparse", and in
            float32 "dense, other format", the dense model in the other memory format.
        setting: the precision and memory format of all times, such as "bfloat16 autocast, channels_last".
    """

    layers: tuple[LayerReport, ...]
    why: str
    whole: Mapping[str, Spread] = field(default_factory=dict)
    setting: str = ""

    @property
    def whole_dense_ms(self) -> float | None:
        """The shortest forward and backward of the whole model without the sparse kernels, in the faster format."""
        return min(self.whole[name].least for name in self.whole if name != SPARSE) if self.whole else None

    @property
    def whole_fast_ms(self) -> float | None:
        """The shortest forward and backward of the whole model with the sparse kernels."""
        return self.whole[SPARSE].least if self.whole else None

    @property
    def dense_ms(self) -> float:
        """Forward and backward of all measured layers on torch's dense kernels."""
        return sum(row.dense_ms or 0.0 for row in self.layers)

    @property
    def planned_ms(self) -> float:
        """The same as planned: the faster of the two for every layer."""
        return sum((row.sparse_ms if row.chosen == "sparse" else row.dense_ms) or 0.0 for row in self.layers)

    def __str__(self) -> str:
        matrices = [row for row in self.layers if len(row.shape) > 1]
        lines = [layer_table(matrices)]
        for why, count in Counter(row.why for row in self.layers if len(row.shape) < 2).items():
            lines.append(f"{count} more without a matrix of weights: {why}")
        swapped = sum(row.chosen == "sparse" for row in matrices)
        lines.append(
            f"forward + backward of these layers: dense {self.dense_ms:.2f} ms, as planned {self.planned_ms:.2f} ms; "
            f"{swapped} of {len(matrices)} run sparse. All times are in {self.setting}. {self.why}"
        )
        return "\n".join(lines)
