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
from granet.criterion import Layer
from granet.sparsifier.sparse_storage.linear import BLOCK, Pieces
from granet.sparsifier.sparse_storage.values import bounds, give_back, part, positions_of, taken
from granet.sparsifier.sparse_storage.weight import shape_of


@dataclass
class Gradient:
    """A dense gradient of one layer, or its entries that count: those at `positions`, others are zero."""

    shape: tuple[int, ...]
    values: Tensor
    positions: Tensor | None = None  # in order; None: all of them

    def part(self, start: int, stop: int, stride: int = 1, *, out: Tensor | None = None) -> Tensor:
        """Returns the entries from flat index `start` to `stop`, or the first of each `stride`, dense; see `part`."""
        if self.positions is None:
            return self.values[start:stop:stride]
        return part(self.values, self.positions, start, stop, stride, out=out)

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


class Gradients:
    """The gradients of the step under way, by layer.

    Args:
        candidates: gives, for a number of active weights, how many the coming update can grow at most; None for any
            number.
        mask: gives the mask of a layer by its name.
        explored: gives a mask of the inactive weights of a layer that the coming update looks at; None for all.
        alone: whether this process has all of a step's gradients.
    """

    def __init__(
        self,
        candidates: Callable[[int], int | None],
        mask: Callable[[str], Tensor],
        explored: Callable[[str], Tensor | None] = lambda name: None,
        *,
        alone: bool,
    ):
        self.found: dict[str, Gradient] = {}
        self._candidates, self._mask, self._explored, self._alone = candidates, mask, explored, alone
        self._passes: dict[str, set[int]] = {}  # the backwards of this step, by layer
        self._latest: dict[str, int] = {}  # the backward of the latest gradient
        self._several: bool | None = None  # whether the last step had several of them; None: not known yet
        self._shared: set[str] = set()  # layers that a forward uses several times, so far as that is known
        self.cut: set[str] = set()  # layers of which a further gradient came after candidates had been chosen

    def count(self, name: str) -> None:
        """Notes that a backward has reached the layer's values."""
        self._passes.setdefault(name, set()).add(torch._C._current_graph_task_id())

    def zero(self, name: str, device: torch.device) -> Gradient:
        """Returns a gradient of zeros, with the entries that this step's gradients of the layer have."""
        mask, drawn = self._mask(name), self._explored(name)
        positions = None if drawn is None else positions_of(mask | drawn)
        size = mask.numel() if positions is None else len(positions)
        return Gradient(tuple(mask.shape), torch.zeros(size, device=device), positions)

    def begin(self) -> None:
        """Begins a new step."""
        if self._passes:
            self._several = any(len(passes) > 1 for passes in self._passes.values())
        self._passes, self._latest, self.found, self.cut = {}, {}, {}, set()

    @torch.no_grad()
    def add(self, name: str, module: nn.Module, pieces: Pieces) -> None:
        """Takes in the dense gradient of one use of the layer's weight, all of its pieces in order."""
        this, so_far = torch._C._current_graph_task_id(), module.values.grad
        anew = self._latest.get(name) != this and (so_far is None or not so_far.any())  # as zero_grad() leaves it
        self._latest[name] = this
        earlier = None if anew else self.found.get(name)
        drawn, shape, active = self._explored(name), shape_of(module), len(module.positions)
        if drawn is not None:
            self.found[name] = _at(shape, pieces, positions_of(self._mask(name) | drawn), earlier)
            return
        if earlier is not None and earlier.positions is not None:
            self.cut.add(name)
            self._shared.add(name)
        one = self._alone and self._several is False and name not in self._shared and earlier is None
        n = self._candidates(active) if one else None
        if n is None or n + active >= prod(shape) // 2:
            self.found[name] = _whole(shape, pieces, earlier)
        else:
            self.found[name] = _largest(shape, pieces, module.positions, min(n, prod(shape) - active))


def _at(shape: tuple[int, ...], pieces: Pieces, positions: Tensor, earlier: Gradient | None) -> Gradient:
    """The entries at the positions, added to those that came earlier."""
    values = None if earlier is None else earlier.values.clone()
    for start, piece in pieces:
        if values is None:
            values = piece.new_zeros(len(positions), dtype=torch.promote_types(piece.dtype, torch.float32))
        low, high = bounds(positions, [start, start + len(piece)])
        values[low:high] += taken(piece, positions[low:high] - start)
    return Gradient(shape, values, positions)


def _whole(shape: tuple[int, ...], pieces: Pieces, earlier: Gradient | None) -> Gradient:
    """All entries, added to those that came earlier."""
    flat = None if earlier is None else earlier.dense().view(-1).clone()
    for start, piece in pieces:
        if flat is None:
            flat = piece.new_zeros(prod(shape), dtype=torch.promote_types(piece.dtype, torch.float32))
        flat[start : start + len(piece)] += piece
    return Gradient(shape, flat)


def _largest(shape: tuple[int, ...], pieces: Pieces, active: Tensor, n: int) -> Gradient:
    """The entries of active weights and the `n` largest others, of equal ones those of the smallest flat index."""
    kept, pool, finite = None, None, True
    for start, whole in pieces:
        if pool is None:  # memory for all at once: small pieces that stay would tear holes into what is free
            kind = torch.promote_types(whole.dtype, torch.float32)
            kept, pool = (
                whole.new_empty(len(active), dtype=kind),
                _Pool(n, whole.new_empty(0, dtype=kind), active.dtype),
            )
        for begin in range(start, start + len(whole), BLOCK):
            piece = whole[begin - start : begin - start + BLOCK].to(kept.dtype)
            low, high = bounds(active, [begin, begin + len(piece)])
            here = (active[low:high] - begin).long()
            kept[low:high] = piece[here]
            others = piece.abs().index_fill_(0, here, -1.0)
            finite = finite and bool(others.max() < float("inf"))
            if finite:
                pool.add(piece, others, begin)
    if not finite:  # infinite, or NaN: the update says so
        return Gradient(shape, kept.fill_(float("nan")), active)
    found = Gradient(shape, *_merged(kept, active, *pool.best()))
    if prod(shape) > BLOCK:
        give_back()
    return found


class _Pool:
    """The largest of the entries that were added, at most `n` of them when it is asked, by flat index."""

    def __init__(self, n: int, like: Tensor, kind: torch.dtype):
        self._n, self._room = n, n + max(n // 4, BLOCK)
        self._values = like.new_empty(self._room + BLOCK)
        self._places = like.new_empty(self._room + BLOCK, dtype=kind)
        self._size, self._least = 0, -1.0

    def add(self, piece: Tensor, sizes: Tensor, start: int) -> None:
        """Adds entries with their sizes, the first one at flat index `start`; a size below 0 says that it is none."""
        at = (sizes > self._least).nonzero().squeeze(1)
        end = self._size + len(at)
        self._values[self._size : end] = piece[at]
        self._places[self._size : end] = at.add_(start)
        self._size = end
        if end > self._room:
            self._reduce()

    def best(self) -> tuple[Tensor, Tensor]:
        """Returns the `n` largest, of equal ones those added first, and their flat indices."""
        self._reduce()
        return self._values[: self._size], self._places[: self._size]

    def _reduce(self) -> None:
        if self._size <= self._n:
            return
        values = self._values[: self._size]
        among = torch.ones_like(values, dtype=torch.bool)
        (best,) = topology.top([Layer(values)], criterion.magnitude, self._n, [among])
        for tensor in (self._values, self._places):
            tensor[: self._n] = tensor[: self._size][best]
        self._size = self._n
        self._least = float(self._values[: self._n].abs().min()) if self._n else float("inf")


def _merged(values: Tensor, positions: Tensor, others: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Values at ordered positions and others between them, all in order."""
    new = torch.searchsorted(positions, places) + torch.arange(len(places), device=places.device)
    total = len(positions) + len(places)
    old = torch.ones(total, dtype=torch.bool, device=places.device).index_fill_(0, new, False)
    both, at = values.new_empty(total), positions.new_empty(total)
    both[old], at[old] = values, positions
    both[new], at[new] = others, places
    return both, at
