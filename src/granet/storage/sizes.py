"""What each tensor of a file takes, against the dense tensor and against the least that its zeros and values allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from granet.storage.codec import LOW, SCALES, VALUES, WHERE, count_nonzero
from granet.storage.packed import Packed
from granet.text import columns


@dataclass(frozen=True)
class Size:
    """The size of one tensor.

    Attributes:
        name: the tensor's name.
        shape: its shape.
        dtype: its dtype in the model.
        stored: how it is stored, in words.
        nonzero: how many entries are not zero as they are stored.
        density: the share of these.
        nbytes: the bytes of its parts.
        dense: the bytes of the dense tensor in the model's dtype.
        limit: the bytes of the values that are not zero and of the entropy of a mask with as many entries at random
            places, or those of all values if they are fewer; and of the scales of int8. Masks with a pattern can need
            less.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    nonzero: int
    density: float
    nbytes: int
    dense: int
    limit: int


def sizes(packed: Packed) -> list[Size]:
    """Returns the size of every tensor, in the order of the file; tensors that are stored with zeros are read."""
    return [_size(packed, name) for name in packed.entries]


def as_json(packed: Packed, found: Sequence[Size], file: int) -> dict[str, Any]:
    """Returns the sizes as plain data; `file` is the size of the file in bytes."""
    total = {"bytes": file, "dense": _total(found, "dense"), "limit": _total(found, "limit")}
    about = {key: value for key, value in packed.about.items() if value is not None}
    return {"file": packed.source, **total, "about": about, "ties": packed.ties, "tensors": [asdict(x) for x in found]}


def as_text(packed: Packed, found: Sequence[Size], file: int) -> str:
    """Returns the sizes as a table for people; `file` is the size of the file in bytes."""
    head = [f"{key} {_short(value)}" for key, value in packed.about.items() if value is not None]
    rows = [["tensor", "shape", "stored as", "density", "bytes", "dense", "limit"]]
    for x in found:
        shape = "x".join(map(str, x.shape)) or "1"
        rows.append([x.name, shape, x.stored, f"{x.density:.2%}", *(f"{n:,}" for n in (x.nbytes, x.dense, x.limit))])
    rows += [[name, "", f"tied to {other}", "", "", "", ""] for name, other in packed.ties.items()]
    rows.append(["header", "", "", "", f"{file - _total(found, 'nbytes'):,}", "", ""])
    dense, limit = _total(found, "dense"), _total(found, "limit")
    entries = sum(math.prod(x.shape) for x in found)
    density = f"{sum(x.nonzero for x in found) / entries:.2%}" if entries else ""
    rows.append(["all", "", "", density, f"{file:,}", f"{dense:,}", f"{limit:,}"])
    end = f"{file / dense:.1%} of the dense tensors, {file / limit:.3f} times the limit" if dense and limit else ""
    return "\n".join(
        [*([", ".join(head), ""] if head else []), columns(rows, right=(3, 4, 5, 6)), *([end] * bool(end))]
    )


def entropy(active: int, size: int) -> float:
    """Returns the entropy of a mask with `active` of `size` entries at random places, in bits.

    >>> round(entropy(100, 1000) / 1000, 3), entropy(0, 8), entropy(500, 1000)
    (0.469, 0.0, 1000.0)
    """
    if not 0 < active < size:
        return 0.0
    share = active / size
    return -size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))


def _size(packed: Packed, name: str) -> Size:
    entry = packed.entries[name]
    own = {
        suffix: packed.parts[name + suffix]
        for suffix in ("", WHERE, LOW, VALUES, SCALES)
        if name + suffix in packed.parts
    }
    part = own.get(VALUES, own.get(""))
    dtype = torch.bool if part is None else part.dtype
    if entry.active is None:
        nonzero, kind = count_nonzero(own[""].read()), ""
    else:
        nonzero, kind = entry.active, "distances" if entry.low else "mask"
    bits_each = 8 * dtype.itemsize if dtype != torch.bool else 0
    limit = math.ceil((nonzero * bits_each + entropy(nonzero, entry.size)) / 8)
    limit = min(limit, entry.size * dtype.itemsize)
    limit += own[SCALES].nbytes if SCALES in own else 0
    stored = " + ".join(filter(None, (kind, "" if kind and not bits_each else _named(dtype))))
    nbytes, density = sum(x.nbytes for x in own.values()), nonzero / entry.size if entry.size else 1.0
    return Size(name, entry.shape, _named(entry.dtype), stored, nonzero, density, nbytes, entry.nbytes, limit)


def _total(found: Sequence[Size], kind: str) -> int:
    return sum(getattr(x, kind) for x in found)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
