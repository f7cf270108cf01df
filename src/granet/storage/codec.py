"""One tensor and its parts in a file: all of its numbers, or those that are not zero and where they stand.

A tensor `name` is stored as one of

- `name`: all its numbers;
- `name:where`, `name:low` and `name:values`: the code of the places of its nonzero entries (`granet.storage.bits`), and
  their values in the order of the flat index. A bool tensor has no values: its nonzero entries are True;
- the same with `name:top` and `name:rest` in place of the values, where that is smaller: the code of their exponents
  (`granet.storage.values`), and a row of the other bytes for each value. In int8 there are no others.

In int8, `name:scales` has one float32 number for each index of the first axis, the output channels of a linear or
convolution layer; an entry is its byte times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granet.engine.precision import quantised_weight
from granet.storage import bits, values
from granet.storage.container import DTYPES, Part
from granet.text import short

WHERE, LOW, VALUES, TOP, REST, SCALES = ":where", ":low", ":values", ":top", ":rest", ":scales"
_HEADER = 100  # bytes that a further part of a tensor takes in the file's header, at most
_MOST_LOW = 40  # bits
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def named(dtype: torch.dtype) -> str:
    """Returns the name of a dtype.

    >>> named(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


_BY_NAME = {named(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Entry:
    """How a tensor is stored.

    Attributes:
        shape: the shape of the tensor.
        dtype: the dtype of the tensor.
        stored: the dtype of its numbers in the file, which may be narrower.
        active: how many of its entries are stored; None if all are, zeros too.
        low: the low bits of the code of their places.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    active: int | None = None
    low: int = 0

    @property
    def size(self) -> int:
        """The number of entries of the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in memory."""
        return self.size * self.dtype.itemsize

    def as_json(self) -> dict[str, Any]:
        """Returns the entry as plain data."""
        plain: dict[str, Any] = {"shape": list(self.shape), "dtype": named(self.dtype)}
        if self.stored != self.dtype:
            plain["stored"] = named(self.stored)
        return plain if self.active is None else plain | {"active": self.active, "low": self.low}

    @staticmethod
    def from_json(plain: Any) -> Entry:
        """Returns the entry that plain data describe.

        Raises:
            ValueError: they describe none.
        """
        shape, dtype = plain["shape"], plain["dtype"]
        active, low, stored = plain.get("active"), plain.get("low", 0), plain.get("stored", dtype)
        for each in (dtype, stored):
            if each not in _BY_NAME:
                raise ValueError(f"its dtype is {short(each)}, and these can be read: {', '.join(_BY_NAME)}")
        if not isinstance(shape, list) or not all(type(number) is int and 0 <= number < 2**48 for number in shape):
            raise ValueError(f"its shape is {short(shape)}, and a list of whole numbers is allowed")
        size = prod(shape)
        if size >= 2**48:
            raise ValueError(f"its shape {short(shape)} has more than {2**48:,} entries")
        if active is not None and not (type(active) is int and 0 <= active <= size):
            raise ValueError(f"{short(active)} of its entries are stored, and it has {size:,}")
        if type(low) is not int or not 0 <= low <= _MOST_LOW:
            raise ValueError(f"the low bits of its code are {short(low)}, and 0 to {_MOST_LOW} are allowed")
        return Entry(tuple(shape), _BY_NAME[dtype], _BY_NAME[stored], active, low)


def encode(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    *,
    signed_zeros: bool = False,
    latest: Latest | None = None,
) -> tuple[Entry, dict[str, Part]]:
    """Returns the entry and the parts of a tensor; a part is computed when it is read.

    Args:
        name: the tensor's name.
        tensor: the tensor.
        dtype: what the numbers of a floating-point matrix are converted to if they are wider.
        signed_zeros: whether -0.0 is stored as a number; else it counts as zero.
        latest: what the tensors of a file share, so that the parts of each are computed from the same numbers.

    Raises:
        ValueError: it has NaN or infinite numbers, and int8 cannot hold them.
    """
    source = _Source(tensor, _narrower(tensor, dtype), signed_zeros, latest or Latest())
    flat, scales = source.numbers(), source.scales()
    shape, stored, itemsize = tuple(tensor.shape), flat.dtype, 0 if flat.dtype == torch.bool else flat.dtype.itemsize
    mask = source.mask()
    active = int(np.count_nonzero(mask))
    low, unary = bits.cheapest(mask)
    count = -(-active // 8)
    parts = {}
    if scales is not None:
        parts[name + SCALES] = Part(scales.dtype, tuple(scales.shape), source.scales)
    if unary + low * count + active * itemsize + 2 * _HEADER >= flat.numel() * stored.itemsize:
        parts[name] = Part(stored, shape, lambda: source.numbers().view(shape))
        return Entry(shape, tensor.dtype, stored), parts
    parts[name + WHERE] = Part(torch.uint8, (unary,), lambda: torch.from_numpy(bits.unary_code(source.mask(), low)))
    if low:
        parts[name + LOW] = Part(torch.uint8, (low, count), lambda: torch.from_numpy(bits.planes(source.mask(), low)))
    top = len(source.top()) if scales is not None or stored.is_floating_point else active
    if itemsize and top + _HEADER < active:
        parts[name + TOP] = Part(torch.uint8, (top,), lambda: torch.from_numpy(source.top()))
        if itemsize > 1:
            parts[name + REST] = Part(torch.uint8, (active, itemsize - 1), source.rest)
    elif itemsize:
        parts[name + VALUES] = Part(stored, (active,), source.values)
    return Entry(shape, tensor.dtype, stored, active, low), parts


class Latest:
    """The numbers of the tensor of which a part was computed last: mostly, its next part follows."""

    def __init__(self):
        self.source: _Source | None = None
        self.found: tuple[Tensor, Tensor | None, np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class _Source:
    """A tensor to be stored, of which each part is computed when it is asked for."""

    tensor: Tensor
    stored: torch.dtype
    signed_zeros: bool
    latest: Latest

    def _found(self) -> tuple[Tensor, Tensor | None, np.ndarray]:
        if self.latest.source is not self or self.latest.found is None:
            self.latest.source = self.latest.found = None  # of another tensor: room for this one
            numbers, scales = self._rounded()
            self.latest.found = numbers, scales, _nonzero(numbers, self.signed_zeros)
            self.latest.source = self
        return self.latest.found

    def _rounded(self) -> tuple[Tensor, Tensor | None]:
        tensor = self.tensor.detach().cpu()
        if self.stored == torch.int8 and tensor.dtype != torch.int8:
            if not tensor.isfinite().all():
                raise ValueError("it has NaN or infinite numbers, which int8 cannot hold: save it as bfloat16")
            numbers, scales = quantised_weight(tensor.float())
            return numbers.reshape(-1), scales
        return tensor.to(self.stored).contiguous().view(-1), None

    def numbers(self) -> Tensor:
        """Returns the numbers as they are stored, flat and on the CPU."""
        return self._found()[0]

    def scales(self) -> Tensor | None:
        """Returns the scales of int8."""
        return self._found()[1]

    def mask(self) -> np.ndarray:
        """Returns which numbers are stored."""
        return self._found()[2]

    def values(self) -> Tensor:
        """Returns the numbers that are stored."""
        return self.numbers()[torch.from_numpy(self.mask())]

    def top(self) -> np.ndarray:
        """Returns the code of their exponents."""
        return values.coded(values.split(_raw(self.values()))[0])

    def rest(self) -> Tensor:
        """Returns their other bytes."""
        return torch.from_numpy(values.split(_raw(self.values()))[1])


def count_nonzero(tensor: Tensor) -> int:
    """Returns the number of entries that are not zero."""
    return int(torch.count_nonzero(_comparable(tensor)))


def check(name: str, entry: Entry, parts: Mapping[str, Part]) -> set[str]:
    """Returns the names of the parts of a tensor, whose shapes and dtypes fit its entry; nothing is read.

    Raises:
        ValueError: a part is missing, or does not fit.
    """
    used: set[str] = set()

    def need(suffix: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        part = parts.get(name + suffix)
        if part is None:
            raise ValueError(f"its part {name + suffix!r} is missing")
        if part.shape != shape or part.dtype != dtype:
            found = f"{part.dtype} of shape {part.shape}"
            raise ValueError(f"its part {name + suffix!r} is {found}, and {dtype} of shape {shape} is needed")
        used.add(name + suffix)

    active, stored = entry.active, entry.stored
    if active is None:
        need("", stored, entry.shape)
    else:
        need(WHERE, torch.uint8, _code_shape(entry, parts.get(name + WHERE)))
        if entry.low:
            need(LOW, torch.uint8, (entry.low, -(-active // 8)))
        if name + TOP in parts:
            need(TOP, torch.uint8, parts[name + TOP].shape[:1] or (1,))
            if stored.itemsize > 1:
                need(REST, torch.uint8, (active, stored.itemsize - 1))
        elif stored != torch.bool:
            need(VALUES, stored, (active,))
    if stored == torch.int8 and entry.dtype.is_floating_point:
        need(SCALES, torch.float32, entry.shape[:1])
    elif stored != entry.dtype and not (stored.is_floating_point and entry.dtype.is_floating_point):
        raise ValueError(f"its numbers are stored as {stored}, and cannot be those of a {entry.dtype} tensor")
    return used


def verify(name: str, entry: Entry, parts: Mapping[str, Part]) -> None:
    """Refuses a tensor whose places or scales are impossible; the tensor itself is not made.

    Raises:
        ValueError: says what was found, and what is allowed.
    """
    if name + SCALES in parts and not parts[name + SCALES].read().isfinite().all():
        raise ValueError("its scales have NaN or infinite numbers")
    if entry.active is not None:
        bits.verify(*_code(name, parts), entry.size, entry.active)
        if name + TOP in parts:
            values.decoded(parts[name + TOP].read().numpy(), entry.active)
    elif parts[name].dtype == torch.bool and (parts[name].read().view(torch.uint8) > 1).any():
        raise ValueError("its bytes must be 0 or 1")


@torch.no_grad()
def decode(name: str, entry: Entry, parts: Mapping[str, Part], out: Tensor) -> None:
    """Writes a verified tensor into `out`, which has its shape; its dtype and device may be others."""
    out, scales = out.detach(), parts.get(name + SCALES)
    same = out.dtype == entry.stored and scales is None
    straight = same and out.is_contiguous() and out.device.type == "cpu"
    target = out if straight else torch.empty(entry.shape, dtype=entry.stored)
    if entry.active is None:
        parts[name].fill(target)
    else:
        flat = _raw(target.zero_())
        places = bits.places(*_code(name, parts), entry.size, entry.active)
        flat[places] = 1 if entry.stored == torch.bool else _raw(nonzero_values(name, entry, parts))
    if scales is not None:
        target = target.float() * scales.read().view(-1, *[1] * (len(entry.shape) - 1))
    if not straight:
        out.copy_(target)


def nonzero_values(name: str, entry: Entry, parts: Mapping[str, Part]) -> Tensor:
    """Returns the stored values of the nonzero entries of a verified tensor, flat."""
    if entry.active is None:
        flat = parts[name].read().view(-1)
        return flat[torch.from_numpy(_nonzero(flat, False))]
    if name + TOP not in parts:
        return parts[name + VALUES].read()
    top = values.decoded(parts[name + TOP].read().numpy(), entry.active)
    rest = parts[name + REST].read().numpy() if name + REST in parts else np.empty((entry.active, 0), dtype=np.uint8)
    return torch.from_numpy(values.joined(top, rest)).view(entry.stored)


def exponents(found: Tensor) -> np.ndarray:
    """Returns the byte of each of some contiguous values that is coded."""
    return values.split(_raw(found))[0]


def _code_shape(entry: Entry, part: Part | None) -> tuple[int, ...]:
    """Returns the shape that the code of the places must have: a mask's is fixed, others have a largest one."""
    if not entry.low:
        return (-(-entry.size // 8),)
    most = -(-((entry.active or 0) + (entry.size >> entry.low)) // 8)
    fits = part is not None and len(part.shape) == 1 and part.shape[0] <= most
    return part.shape if fits else (most,)


def _code(name: str, parts: Mapping[str, Part]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the unary code and the planes."""
    planes = parts[name + LOW].read().numpy() if name + LOW in parts else np.empty((0, 0), dtype=np.uint8)
    return parts[name + WHERE].read().numpy(), planes


def _narrower(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype in which the numbers of a tensor are stored."""
    wide = tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0
    return dtype if dtype is not None and wide and tensor.dtype.itemsize > dtype.itemsize else tensor.dtype


def _nonzero(flat: Tensor, signed_zeros: bool) -> np.ndarray:
    if signed_zeros or not (flat.is_floating_point() or flat.is_complex()):
        return _raw(flat) != 0
    return _comparable(flat).ne(0).numpy()


def _comparable(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a wider one where torch compares no such numbers (float8)."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _raw(tensor: Tensor) -> np.ndarray:
    """Returns the entries of a contiguous tensor as whole numbers of the same bits, flat, sharing its memory."""
    return tensor.view(-1).view(_INTEGERS[tensor.dtype.itemsize]).numpy()
