"""Reports of what was measured and chosen; they print as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from granet.text import columns


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
        error: the largest difference to the dense output, relative to that output's largest value.
        nbytes: bytes of packed weights and their index structures.
        arena_nbytes: bytes of working memory for one call.
    """

    layers: tuple[LayerReport, ...]
    dense_ms: float
    fast_ms: float
    chosen: str
    why: str
    error: float
    nbytes: int = 0
    arena_nbytes: int = 0

    def __str__(self) -> str:
        whole = (
            f"whole model: dense {self.dense_ms:.2f} ms, compiled {self.fast_ms:.2f} ms "
            f"({self.dense_ms / max(self.fast_ms, 1e-9):.2f}x), runs {self.chosen}: {self.why}; "
            f"largest relative difference {self.error:.1e}"
        )
        return f"{layer_table(self.layers)}\n{whole}"
