"""Saving and loading: `pack` and `save` make a model small, `load` brings it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, overload

import torch
from torch import Tensor

from granet import files
from granet.names import unknown
from granet.storage import codec, container, contents
from granet.storage.container import Part, StorageError
from granet.storage.packed import Model, Packed, from_file

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def pack(model: Any, dtype: str | torch.dtype | None = None, *, signed_zeros: bool = False) -> Packed:
    """Returns the tensors of a model in few bytes, in memory; they are copies.

    Any model that has zeros becomes small, wherever they came from. Masks of `torch.nn.utils.prune` and
    `torch.ao.pruning` are applied, and the result has the names of a plain model.

    Args:
        model: a module, a `Sparsifier`, or a state dict.
        dtype: "float32", "bfloat16" or "int8": what the numbers of matrices are rounded to where they are wider;
            vectors (biases, batch norms) stay as they are. None keeps all numbers.
        signed_zeros: whether -0.0 is kept. It equals 0.0, and counts as zero if not.

    Raises:
        TypeError: the model is something else.
        ValueError: the dtype is unknown, or a tensor cannot be stored.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> _ = model[0].weight.data.masked_fill_(torch.arange(10_000).view(100, 100) % 10 > 0, 0)
    >>> packed = pack(model)
    >>> packed.nbytes < 8600, sum(4 * p.numel() for p in model.parameters())
    (True, 44440)
    >>> all(torch.equal(packed.unpack()[name], tensor) for name, tensor in model.state_dict().items())
    True
    """
    found = _of_model(model, dtype, signed_zeros)
    held = {name: part.read().clone() for name, part in found.parts.items()}
    parts = {name: Part(tensor.dtype, tuple(tensor.shape), tensor.detach) for name, tensor in held.items()}
    return Packed(found.source, found.about, found.entries, found.ties, parts)


def save(model: Any, path: str | Path, dtype: str | torch.dtype | None = None, *, signed_zeros: bool = False) -> None:
    """Writes a model into one safetensors file, in which zeros take next to nothing; see `pack` for what can be saved.

    A reader sees the old file or the new one, never a part. Tensors are stored one after the other, tied ones once.

    Args:
        model: a module, a `Sparsifier`, or a state dict.
        path: the file.
        dtype: what the numbers of matrices are rounded to, as for `pack`; None keeps all.
        signed_zeros: whether -0.0 is kept, as for `pack`.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
        TypeError, ValueError: as for `pack`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    found = _of_model(model, dtype, signed_zeros)
    try:
        with files.replacing(path) as file:
            container.write(file, found.metadata(), found.parts)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}; what was there is untouched") from error


@overload
def load(path: str | Path, into: None = None) -> dict[str, Tensor]: ...


@overload
def load(path: str | Path, into: Model) -> Model: ...


def load(path, into=None):
    """Returns the model `into` with the tensors of a file; without a model, the dense tensors by name.

    The file is one that `save` wrote, or any other safetensors file. It is checked against its size, against itself
    and against the model, before anything is allocated and before a tensor of the model changes; nothing is unpickled.
    The model keeps its tensors, on their devices; what was saved as float32 comes back bit for bit. Tensors that were
    tied when they were saved are tied again.

    Args:
        path: the file.
        into: the model, which must have all tensors of the file, and no others.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: a ValueError that names the file, the tensor, what was found and what is allowed. The model is as
            it was, unless the message says that the file changed while it was read.
        TypeError: `into` is no module.
    """
    with opened(path) as found:
        return found.unpack(into)


@contextmanager
def opened(path: str | Path) -> Iterator[Packed]:
    """Gives what a file holds, whose tensors are read when they are asked for, while the `with` block lasts.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: it is no plain file, no safetensors file, is truncated, or contradicts itself.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise StorageError(f"{path} is no plain file")
    with path.open("rb", buffering=0) as file:
        yield from_file(file, str(path))


def write(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors into an open file as they are, such that they come back bit for bit, -0.0 included."""
    found = _described(tensors, {}, None, signed_zeros=True)
    container.write(file, found.metadata(), found.parts)


def _of_model(model: Any, dtype: str | torch.dtype | None, signed_zeros: bool) -> Packed:
    """Returns a packed model whose parts are computed when they are read."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise ValueError(unknown("dtype", name, _DTYPES))
    tensors = contents.tensors_of(model)
    about = contents.about(model, tensors) | {"dtype": name}
    return _described(tensors, about, None if name is None else _DTYPES[name], signed_zeros)


def _described(
    tensors: Mapping[str, Tensor], about: dict[str, Any], dtype: torch.dtype | None, signed_zeros: bool
) -> Packed:
    """Returns packed tensors whose parts are computed when they are read."""
    ties = contents.tied(tensors)
    found = Packed("the packed model", about, {}, ties, {})
    parts: dict[str, Part] = {}
    latest = codec.Latest()
    for name, tensor in tensors.items():
        if name in ties:
            continue
        with found.said_of(name):
            found.entries[name], new = codec.encode(name, tensor, dtype, signed_zeros=signed_zeros, latest=latest)
        for part in new:
            if part in parts or (part != name and part in tensors):
                raise ValueError(f"two tensors would both be stored as {part!r}: rename one")
        parts |= new
    return Packed(found.source, about, found.entries, ties, parts)
