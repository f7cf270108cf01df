"""Where a tensor is not zero, in few bits: a bit mask, or distances in Rice's code where that is smaller.

The distance of an entry is the number of zeros between it and the entry before. It is split at `low` bits. What is
above them is written in unary, as so many 0 bits before a 1 bit; bit j of all distances makes plane j. With `low` = 0
there are no planes, and the unary code is the bit mask itself. For entries at random places this takes a few per cent
more than the entropy (Rice and Plaunt 1971, "Adaptive variable-length coding").
"""

import math

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def cheapest(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Returns for a flat mask the number of low bits with which it takes the fewest bytes, and the unary code's bytes.

    >>> mask = np.zeros(1000, dtype=bool)
    >>> mask[::100] = True
    >>> cheapest(mask)
    (5, 5)
    """
    active, best = int(np.count_nonzero(mask)), (0, -(-mask.size // 8))
    if not 0 < active < mask.size // 2:
        return best
    distances = _distances(mask)
    near = math.floor(math.log2(mask.size / active))
    least = best[1]
    for low in range(max(1, near - 2), near + 2):
        unary = -(-(active + int((distances >> low).sum())) // 8)
        total = unary + low * -(-active // 8)
        if total < least:
            least, best = total, (low, unary)
    return best


def unary_code(mask: NDArray[np.bool_], low: int) -> Bytes:
    """Returns the unary code of a flat mask."""
    if not low:
        return np.packbits(mask)
    ends = np.cumsum((_distances(mask) >> low) + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if ends.size else 0, dtype=bool)
    bits[ends] = True
    return np.packbits(bits)


def planes(mask: NDArray[np.bool_], low: int) -> Bytes:
    """Returns the planes of the low bits of a flat mask, one a row."""
    distances = _distances(mask)
    return np.stack([np.packbits((distances >> plane & 1).astype(bool)) for plane in range(low)])


def verify(unary: Bytes, low_planes: Bytes, size: int, active: int) -> None:
    """Refuses a code that does not have `active` entries, or has some beyond `size`.

    Raises:
        ValueError: says what was found, and what is allowed.
    """
    found = int(np.bitwise_count(unary).sum(dtype=np.int64))
    if found != active:
        raise ValueError(f"{found:,} bits of its mask are set, and there are {active:,} values")
    ends = np.flatnonzero(unary)
    used = 8 * int(ends[-1]) + 8 - _trailing_zeros(int(unary[ends[-1]])) if ends.size else 0
    low = len(low_planes)
    parts = sum(int(np.bitwise_count(row).sum(dtype=np.int64)) << plane for plane, row in enumerate(low_planes))
    last = used if not low else ((used - active) << low) + parts + active
    if last > size:
        raise ValueError(f"the index of its last value is {last - 1:,}, and it has {size:,} entries")


def places(unary: Bytes, low_planes: Bytes, size: int, active: int) -> NDArray:
    """Returns what selects the entries of a verified code in a flat array: a bool mask, or int64 positions."""
    bits = np.unpackbits(unary).view(bool)
    if not len(low_planes):
        return bits[:size]
    ends = np.flatnonzero(bits)
    high = np.diff(ends, prepend=-1) - 1
    distances = (high << len(low_planes)) + _low_parts(low_planes, active)
    return np.cumsum(distances + 1) - 1


def _distances(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.diff(np.flatnonzero(mask), prepend=-1) - 1


def _trailing_zeros(byte: int) -> int:
    return (byte & -byte).bit_length() - 1


def _low_parts(low_planes: Bytes, active: int) -> NDArray[np.int64]:
    found = np.zeros(active, dtype=np.int64)
    for plane, row in enumerate(low_planes):
        found |= np.unpackbits(row, count=active).astype(np.int64) << plane
    return found
