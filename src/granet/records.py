"""Records: what the sparsifier tells of itself, as frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass

from granet.methods.base import Method
from granet.selection import columns


@dataclass(frozen=True)
class Update:
    """What one topology update did, by parameter name.

    Attributes:
        step: the optimizer step after which it took place.
        active: active weights afterwards.
        grown: weights that became active.
        dropped: weights that became inactive, pruned ones included.
    """

    step: int
    active: Mapping[str, int]
    grown: Mapping[str, int]
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class LayerReport:
    """One sparse parameter in a report: `nonzero` can be below `active`, since regrown weights start from zero."""

    name: str
    shape: tuple[int, ...]
    total: int
    active: int
    nonzero: int


@dataclass(frozen=True)
class SparsityReport:
    """The state of a sparse network. `str(report)` is a table."""

    method: Method
    step: int
    exploration: float
    layers: tuple[LayerReport, ...]
    pattern: str = "unstructured"

    def __str__(self) -> str:
        rows = [["parameter", "shape", "weights", "active", "density", "nonzero"]]
        total = LayerReport(
            "total", (), *(sum(getattr(x, k) for x in self.layers) for k in ("total", "active", "nonzero"))
        )
        for x in (*self.layers, total):
            shape = "x".join(map(str, x.shape))
            rows.append([x.name, shape, f"{x.total:,}", f"{x.active:,}", f"{x.active / x.total:.2%}", f"{x.nonzero:,}"])
        title = repr(self.method) + ("" if self.pattern == "unstructured" else f", pattern {self.pattern},")
        title = f"{title} after {self.step:,} steps; {self.exploration:.1%} of the weights were ever active"
        return f"{title}\n\n{columns(rows, right=(2, 3, 4, 5))}"
