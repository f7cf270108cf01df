"""Numbers at flat positions of a tensor that has zeros elsewhere: what sparse storage holds of a weight."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from math import prod

import torch
from torch import Tensor

from granet import native

PIECE = 1 << 20  # entries that are looked at together, where whole ones would take memory for 64-bit indices


def positions_of(mask: Tensor) -> Tensor:
    """Returns the flat indices of the True entries, in order: in 32 bits where these suffice."""
    flat, kind = mask.reshape(-1), narrowest(mask.numel())
    found = [(piece.nonzero().squeeze(1) + i * PIECE).to(kind) for i, piece in enumerate(flat.split(PIECE))]
    return torch.cat(found) if found else flat.new_empty(0, dtype=kind)


def taken(tensor: Tensor, positions: Tensor) -> Tensor:
    """Returns the entries of a tensor at flat indices."""
    flat = tensor.reshape(-1)
    found = flat.new_empty(len(positions))
    for out, at in zip(found.split(PIECE), positions.split(PIECE), strict=True):
        torch.index_select(flat, 0, at, out=out)
    return found


def narrowest(size: int) -> torch.dtype:
    """Returns the type of flat indices into a tensor of `size` entries."""
    return torch.int32 if size < 1 << 31 else torch.int64


def dense(values: Tensor, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Returns the dense tensor of that shape with the first of the `values` at `positions`, without a gradient."""
    flat = torch.zeros(prod(shape), dtype=dtype or values.dtype, device=values.device)
    return _put(flat, values.detach()[: len(positions)], positions).view(shape)


def bounds(positions: Tensor, places: list[int]) -> list[int]:
    """Returns how many of the ordered `positions` are below each of the `places`."""
    return torch.searchsorted(positions, torch.tensor(places, dtype=positions.dtype, device=positions.device)).tolist()


def part(
    values: Tensor, positions: Tensor, start: int, stop: int, stride: int = 1, *, out: Tensor | None = None
) -> Tensor:
    """Returns what a dense tensor with `values` at ordered `positions` has from `start` to `stop`, every `stride`.

    With `out`, a flat tensor of that size or more, it is written there.
    """
    low, high = bounds(positions, [start, stop])
    size = -(-(stop - start) // stride)
    flat = values.new_zeros(size) if out is None else out[:size].zero_()
    for at, inside in zip(positions[low:high].split(PIECE), values.detach()[low:high].split(PIECE), strict=True):
        at = at - start
        if stride > 1:
            kept = at % stride == 0
            at, inside = at[kept] // stride, inside[kept]
        _put(flat, inside, at)
    return flat


def _put(flat: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Puts the values at the positions of a flat tensor, and returns it."""
    quick = flat.dtype == values.dtype == torch.float32 and positions.dtype == torch.int32
    if quick and flat.device.type == "cpu" and native.ready():
        torch.ops.granet.place_values(flat, values.contiguous(), positions)
    else:
        flat.index_copy_(0, positions.long(), values.to(flat.dtype))
    return flat


class Move:
    """From the active weights of one mask, in order, to those of another.

    Args:
        positions: the flat indices of the active weights before.
        old: their mask.
        new: the mask of those after.
        size: how many numbers there are to be; as many as weights if None.

    Attributes:
        before: the number of active weights before.
        positions: the flat indices of those after.
        grown: which of these were not active before.
    """

    def __init__(self, positions: Tensor, old: Tensor, new: Tensor, size: int | None):
        self.before, self.positions = len(positions), positions_of(new)
        self._size = size or len(self.positions)
        self._kept = taken(new, positions)
        self.grown = taken(old, self.positions).logical_not_()

    def __call__(self, numbers: Tensor, start: Tensor | None = None) -> Tensor:
        """Returns the numbers of all active weights afterwards; those of grown ones are `start`, zero if None."""
        moved = numbers.new_zeros(self._size)
        here = moved[: len(self.positions)]
        here.masked_scatter_(~self.grown, numbers[: self.before][self._kept])
        if start is not None:
            here.masked_scatter_(self.grown, start.to(numbers.dtype).expand(int(self.grown.count_nonzero())))
        return moved


def give_back() -> None:
    """Has the C library give memory that was freed back to the system, where it can.

    glibc keeps freed blocks of up to 32 MB, and what an update needs for a moment would stay with the process.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim():
    try:
        return ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else None
    except (OSError, AttributeError):  # another C library
        return None
