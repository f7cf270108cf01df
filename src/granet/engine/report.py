"""Reports of what was measured and chosen; they print as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def layer_table(rows: Sequence[LayerReport]) -> list[str]:
    """Returns the lines of a table with one row per layer."""
    lines = [f"{'layer':<32} {'weight':<18} {'density':>7} {'dense ms':>9} {'sparse ms':>9}  chosen"]
    for row in rows:
        times = [f"{t:>9.3f}" if t is not None else f"{'-':>9}" for t in (row.dense_ms, row.sparse_ms)]
        shape = "x".join(map(str, row.shape))
        lines.append(f"{row.name:<32} {shape:<18} {row.density:>7.1%} {' '.join(times)}  {row.chosen}: {row.why}")
    return lines


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
        return "\n".join([*layer_table(self.layers), whole])
