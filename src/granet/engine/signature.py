"""Signatures of calls: what must be the same for a compiled model to serve another call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Signature = tuple[object, ...]


def signature_of(inputs: Sequence[object], named: Mapping[str, object]) -> Signature:
    """Returns the structure of a call's arguments: shapes, types and devices of tensors, and all other values."""
    return _describe(tuple(inputs)), _describe(dict(named))


def _describe(value: object) -> tuple:
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return (type(value), *map(_describe, value))
    if isinstance(value, dict):
        return (dict, *((key, _describe(value[key])) for key in sorted(value, key=repr)))
    return type(value), value if isinstance(value, int | float | str | None) else None


def signature_text(signature: Signature) -> str:
    """Returns a signature in words, for messages."""
    words: list[str] = []

    def walk(form: tuple, name: str = "") -> None:
        kind, *rest = form
        if kind is Tensor:
            shape, dtype, device = rest
            kind = "" if dtype == torch.float32 else f" of {str(dtype).removeprefix('torch.')}"
            place = "" if device == "cpu" else f" on {device}"
            words.append(name + ("x".join(map(str, shape)) or "a number") + kind + place)
        elif kind is dict:
            for key, item in rest:
                walk(item, f"{key}=")
        elif issubclass(kind, list | tuple):
            for item in rest:
                walk(item)
        else:
            words.append(name + (kind.__name__ if rest == [None] and kind is not type(None) else repr(rest[0])))

    for form in signature:
        walk(form)
    return ", ".join(words) or "no inputs"
