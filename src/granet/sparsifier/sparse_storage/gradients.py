"""The dense gradients of a step after which a method grows weights by them: no more of them than the growth needs.

A layer's dense gradient exists for a moment in every backward. Where the method says how many weights a layer can grow
at most, and a step is one backward on one process, that many largest ones are kept, with those of the active weights:
the update chooses among them as among all. Where a step accumulates several backwards, or several ranks average their
gradients, the sum is known only in the end, and the whole gradient of each layer is kept until the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from granet import criterion, topology
from granet.criterion import Layer, NonFiniteScores


@dataclass
class Gradient:
    """A dense gradient of one layer, or its entries that count: those at `positions`, others are zero."""

    shape: tuple[int, ...]
    values: Tensor
    positions: Tensor | None = None  # in order; None: all of them

    def part(self, start: int, stop: int, stride: int = 1) -> Tensor:
        """Returns the entries from flat index `start` to `stop`, or the first of each `stride`, dense."""
        if self.positions is None:
            return self.values[start:stop:stride]
        return part(self.values, self.positions, start, stop, stride)

    def at(self, positions: Tensor) -> Tensor:
        """Returns the entries at flat indices."""
        if self.positions is None:
            return self.values[positions.long()]
        found = torch.searchsorted(self.positions, positions).clamp_(max=len(self.positions) - 1)
        return self.values[found].where(self.positions[found] == positions, 0)

    def dense(self) -> Tensor:
        """Returns it as a dense tensor."""
        if self.positions is None:
            return self.values.view(self.shape)
        flat = self.values.new_zeros(prod(self.shape))
        return flat.index_copy_(0, self.positions.long(), self.values).view(self.shape)


def part(values: Tensor, positions: Tensor, start: int, stop: int, stride: int = 1) -> Tensor:
    """Returns what a dense tensor with `values` at ordered `positions` has from `start` to `stop`, every `stride`."""
    ends = torch.searchsorted(positions, torch.tensor([start, stop], dtype=positions.dtype, device=positions.device))
    low, high = ends.tolist()
    at, inside = positions[low:high].long() - start, values.detach()[low:high]
    if stride > 1:
        kept = at % stride == 0
        at, inside = at[kept] // stride, inside[kept]
    return values.new_zeros(-(-(stop - start) // stride)).index_copy_(0, at, inside)


class Gradients:
    """The gradients of the step under way, by layer.

    Args:
        candidates: gives, for a number of active weights, how many the coming update can grow at most; None for any
            number.
        mask: gives the mask of a layer by its name.
        alone: whether this process has all of a step's gradients.
    """

    def __init__(self, candidates: Callable[[int], int | None], mask: Callable[[str], Tensor], *, alone: bool):
        self.found: dict[str, Gradient] = {}
        self._candidates, self._mask, self._alone = candidates, mask, alone
        self._passes: dict[str, set[int]] = {}  # the backwards of this step, by layer
        self._latest: dict[str, int] = {}  # the backward of the latest gradient
        self._several: bool | None = None  # whether the last step had several of them; None: not known yet
        self._shared: set[str] = set()  # layers that a forward uses several times, so far as that is known
        self.cut: set[str] = set()  # layers of which a further gradient came after candidates had been chosen

    def count(self, name: str) -> None:
        """Notes that a backward has reached the layer's values."""
        self._passes.setdefault(name, set()).add(torch._C._current_graph_task_id())

    def begin(self) -> None:
        """Begins a new step."""
        if self._passes:
            self._several = any(len(passes) > 1 for passes in self._passes.values())
        self._passes, self._latest, self.found, self.cut = {}, {}, {}, set()

    @torch.no_grad()
    def add(self, name: str, module: nn.Module, grad: Tensor) -> None:
        """Takes in the dense gradient of one use of the layer's weight."""
        this, so_far = torch._C._current_graph_task_id(), module.values.grad
        anew = self._latest.get(name) != this and (so_far is None or not so_far.any())  # as zero_grad() leaves it
        self._latest[name] = this
        earlier = None if anew else self.found.get(name)
        grad = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
        if earlier is not None:
            if earlier.positions is not None:
                self.cut.add(name)
                self._shared.add(name)
            grad = earlier.dense() + grad
        shape = tuple(grad.shape)
        mask = self._mask(name)
        n = (
            self._candidates(topology.count(mask))
            if self._alone and self._several is False and name not in self._shared
            else None
        )
        if n is None or n + topology.count(mask) >= prod(shape) // 2:
            self.found[name] = Gradient(shape, grad.contiguous().clone().view(-1))
            return
        try:
            n = min(n, mask.numel() - topology.count(mask))
            (best,) = topology.top([Layer(grad.contiguous())], criterion.magnitude, n, [~mask])
        except NonFiniteScores:  # the update says so
            best = mask
        positions = (best | mask).reshape(-1).nonzero().squeeze(1)
        values = grad.reshape(-1)[positions]
        if best is mask:
            values = values.fill_(float("nan"))
        self.found[name] = Gradient(shape, values, positions.to(torch.int32 if prod(shape) < 1 << 31 else torch.int64))
