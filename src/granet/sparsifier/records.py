"""Records of updates and of the sparse network, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from granet.criterion import Layer, effective
from granet.methods.base import Method
from granet.text import columns
from granet.topology import count


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

    @classmethod
    def between(
        cls, step: int, old: Mapping[str, Tensor], new: Mapping[str, Tensor], active: Mapping[str, int]
    ) -> Update:
        """Returns the record of an update from the masks `old` to `new`.

        A mask that is the same tensor in both has not changed.
        """
        grown, dropped = dict.fromkeys(new, 0), dict.fromkeys(new, 0)
        for name, after in new.items():
            if (before := old[name]) is not after:
                grown[name], dropped[name] = count(after > before), count(before > after)
        return cls(step, dict(active), grown, dropped)

    @property
    def changed(self) -> bool:
        """Whether any mask is another one than before."""
        return any(self.grown.values()) or any(self.dropped.values())


@dataclass(frozen=True)
class LayerReport:
    """One sparse parameter in a report: `nonzero` can be below `active`, since regrown weights start from zero."""

    name: str
    shape: tuple[int, ...]
    total: int
    active: int
    nonzero: int

    @classmethod
    def from_layer(cls, name: str, layer: Layer, active: int) -> LayerReport:
        """The report of a layer as it is now."""
        return cls(name, tuple(layer.shape), layer.numel(), active, count(effective(layer) != 0))


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
