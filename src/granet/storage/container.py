"""Safetensors files, read and written one tensor at a time, and believed only where the file's size bears them out.

The safetensors library reads the same files. It maps them into memory, where a file that shrinks meanwhile kills the
process, and it writes from copies of all tensors.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from granet.parsing import from_json
from granet.text import short

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
_MOST_ENTRIES = 2**48  # of a tensor: products stay far below 2**63


class StorageError(ValueError):
    """A file that is not what it claims, or does not fit the model: names the file, the tensor, and what is wrong."""


@dataclass(frozen=True)
class Part:
    """A tensor of a file that is computed when it is asked for.

    Attributes:
        dtype: of its entries.
        shape: its shape.
        make: returns the tensor, contiguous and on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Returns the tensor, contiguous and on the CPU."""
        return self.make()

    def fill(self, out: Tensor) -> None:
        """Writes the tensor into `out`, which is contiguous, on the CPU, and of the same dtype and shape."""
        out.copy_(self.make())


class FilePart(Part):
    """A tensor of an open file, read straight into the memory where it is wanted."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], file: BinaryIO, at: int, what: str):
        super().__init__(dtype, shape, self._made)
        object.__setattr__(self, "_place", (file, at, what))

    def _made(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self.fill(out)
        return out

    def fill(self, out: Tensor) -> None:
        file, at, what = self._place
        content, done = memory(out), 0
        file.seek(at)
        while done < len(content):
            count = file.readinto(content[done:])
            if not count:
                found = f"{done:,} of {len(content):,} bytes"
                raise StorageError(f"{what} ends after {found}: the file changed while it was read")
            done += count


def read(file: BinaryIO, source: str) -> tuple[dict[str, str], dict[str, Part]]:
    """Returns the metadata and the tensors of a safetensors file, which must stay open while these are read.

    Args:
        file: the file, seekable.
        source: what messages call it.

    Raises:
        StorageError: it is no safetensors file, is truncated, or its header claims what is not there.
    """
    _refuse_big_endian()
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        claimed = f"its header would have {length:,} bytes, and " if size >= 8 else ""
        raise StorageError(f"{source} is not a safetensors file, or is truncated: {claimed}it has {size:,} in all")
    try:
        header = from_json(file.read(length))
    except ValueError as error:
        raise StorageError(f"{source} is not a safetensors file: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise StorageError(f"{source} is not a safetensors file: its header is {short(header)}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StorageError(f"{source}: its metadata are {short(metadata)}, and texts by name are allowed")
    start, parts, ends = 8 + length, {}, []
    for name, claim in header.items():
        try:
            dtype, shape, (begin, end) = _checked(claim, size - start)
        except (LookupError, TypeError, ValueError) as error:
            reason = error if type(error) is ValueError else f"the header says {short(claim)} of it"
            raise StorageError(f"{source}: tensor {name!r}: {reason}") from None
        ends.append((begin, end, name))
        parts[name] = FilePart(dtype, shape, file, start + begin, f"{source}: tensor {name!r}")
    _refuse_holes(ends, size - start, source)
    return metadata, parts


def write(file: BinaryIO, metadata: Mapping[str, str], parts: Mapping[str, Part]) -> None:
    """Writes a safetensors file, one tensor at a time."""
    _refuse_big_endian()
    order = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))  # so that all lie aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        part = parts[name]
        offsets = [at, at + part.nbytes]
        header[name] = {"dtype": NAMES[part.dtype], "shape": list(part.shape), "data_offsets": offsets}
        at += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        content = memory(parts[name].read())
        if content.nbytes != parts[name].nbytes:
            raise StorageError(f"tensor {name!r} changed while it was written")
        file.write(content)


def memory(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, sharing its memory."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _checked(claim: Any, available: int) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """Returns dtype, shape and place of a tensor as the header claims them.

    Raises:
        ValueError: they contradict one another, or the size of the file.
    """
    shape, offsets, kind = claim["shape"], claim["data_offsets"], claim["dtype"]
    if kind not in DTYPES:
        raise ValueError(f"its dtype is {short(kind)}, and these can be read: {', '.join(DTYPES)}")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(number) is int and 0 <= number <= _MOST_ENTRIES for number in shape + offsets):
        raise ValueError(f"its shape is {short(shape)} and its place {short(offsets)}: whole numbers are allowed")
    begin, end = offsets
    needed = prod(shape) * DTYPES[kind].itemsize
    if not begin <= end <= available:
        raise ValueError(f"it would lie in bytes {begin:,} to {end:,} of {available:,}: the file is truncated")
    if needed != end - begin:
        raise ValueError(f"a {kind} tensor of shape {short(shape)} takes {needed:,} bytes, and has {end - begin:,}")
    return DTYPES[kind], tuple(shape), (begin, end)


def _refuse_holes(ends: list[tuple[int, int, str]], available: int, source: str) -> None:
    """Raises StorageError where tensors overlap, or bytes belong to none."""
    at = 0
    for begin, end, name in sorted(ends):
        if begin != at:
            kind = "overlaps the one before" if begin < at else "leaves bytes before it unused"
            raise StorageError(f"{source}: tensor {name!r} {kind}: it begins at byte {begin:,}, not {at:,}")
        at = end
    if at != available:
        raise StorageError(f"{source} has {available - at:,} bytes after its last tensor, and none are allowed")


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise StorageError("these files hold little-endian numbers, and this machine's are big-endian")
