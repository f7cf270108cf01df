"""What each tensor of a file takes, against the dense tensor and against the least that its zeros and values allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from granet.storage import codec, values
from granet.storage.codec import LOW, REST, SCALES, TOP, VALUES, WHERE
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
        limit: the entropy in bytes of a mask with as many entries at random places, and of values with as many of each
            exponent (in int8, of each byte), whose other bits are random; and the scales of int8. Masks with a pattern
            can need less.
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


def _size(packed: Packed, name: str) -> Size:
    entry = packed.entries[name]
    names = [name + suffix for suffix in ("", WHERE, LOW, VALUES, TOP, REST, SCALES)]
    nbytes = sum(packed.parts[part].nbytes for part in names if part in packed.parts)
    found = (
        codec.nonzero_values(name, entry, packed.parts) if entry.stored != torch.bool or entry.active is None else None
    )
    nonzero = entry.active if found is None else found.numel()
    least = values.entropy([nonzero, entry.size - nonzero])
    if found is not None and entry.stored != torch.bool:
        random = entry.stored.is_floating_point or entry.stored != entry.dtype
        least += 8 * nonzero * (entry.stored.itemsize - random)
        least += values.entropy(np.bincount(codec.exponents(found))) if random else 0
    limit = math.ceil(least / 8) + (packed.parts[name + SCALES].nbytes if name + SCALES in packed.parts else 0)
    kind = "" if entry.active is None else "distances" if entry.low else "mask"
    stored = " + ".join(filter(None, (kind, "" if kind and entry.stored == torch.bool else codec.named(entry.stored))))
    density = nonzero / entry.size if entry.size else 1.0
    dtype = codec.named(entry.dtype)
    return Size(name, entry.shape, dtype, stored, nonzero, density, nbytes, entry.nbytes, limit)


def _total(found: Sequence[Size], kind: str) -> int:
    return sum(getattr(x, kind) for x in found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
