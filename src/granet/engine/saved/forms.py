"""The forms of arguments and outputs as JSON: lists, tuples, dicts and plain constants around tensors.

A tensor is {"tensor": shape, "dtype": name} among arguments and {"result": number} in an output; a container is
{"list": [...]}, {"tuple": [...]} or {"dict": [[key, item], ...]}; anything else is {"constant": value}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from granet.engine.signature import Signature
from granet.names import described

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CONSTANTS = (bool, int, float, str, type(None))


def tensors_in(inputs: Sequence[object], named: Mapping[str, object]) -> list[Tensor]:
    """Returns the tensors among a call's arguments, in the order of its signature."""

    def walk(value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                yield from walk(item)
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                yield from walk(value[key])

    return [*walk(tuple(inputs)), *walk(dict(named))]


def encoded(value: object, leaf: Callable[[Tensor], JsonValue]) -> JsonValue:
    """Returns the form of a nest of tensors, each tensor of which becomes what `leaf` makes of it.

    Raises:
        ValueError: if it holds something that a file cannot.
    """
    if isinstance(value, Tensor):
        return leaf(value)
    if type(value) in (list, tuple):
        return {type(value).__name__: [encoded(item, leaf) for item in value]}
    if type(value) is dict and all(type(key) in _CONSTANTS for key in value):
        return {"dict": [[key, encoded(item, leaf)] for key, item in value.items()]}
    if type(value) in _CONSTANTS:
        return {"constant": value}
    raise ValueError(f"it takes or returns {described(value)}, and a file holds tensors, lists, tuples, dicts and text")


def decoded(form: JsonValue, leaf: Callable[[dict], object]) -> object:
    """Returns the nest whose form is given; `leaf` makes a tensor's place of its form. The inverse of `encoded`.

    Raises:
        ValueError: if it is no such form.
    """
    if isinstance(form, dict) and len(form) == 1:
        ((kind, content),) = form.items()
        if kind in ("list", "tuple") and isinstance(content, list):
            items = [decoded(item, leaf) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "dict" and isinstance(content, list):
            pairs = [pair for pair in content if isinstance(pair, list) and len(pair) == 2]
            if len(pairs) == len(content) and all(isinstance(key, _CONSTANTS) for key, _ in pairs):
                return {key: decoded(item, leaf) for key, item in pairs}
        if kind == "constant" and isinstance(content, _CONSTANTS):
            return content
    if isinstance(form, dict) and form.keys() & {"tensor", "result"}:
        return leaf(form)
    raise ValueError(f"{str(form)[:80]} is no form of arguments or of an output")


def described_tensor(tensor: Tensor) -> JsonValue:
    """Returns the form of a tensor among the arguments."""
    if tensor.dtype not in NAMES:
        raise ValueError(f"it takes a tensor of {tensor.dtype}, and a file knows {', '.join(NAMES.values())}")
    return {"tensor": list(tensor.shape), "dtype": NAMES[tensor.dtype]}


def arguments(form: JsonValue) -> tuple[tuple, dict[str, object]]:
    """Returns arguments of a form. Their tensors take no memory, and their numbers mean nothing.

    Raises:
        ValueError: if it is no form of arguments.
    """

    def tensor(leaf: dict) -> Tensor:
        shape, dtype = leaf.get("tensor"), leaf.get("dtype")
        if dtype not in DTYPES or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{str(leaf)[:80]} is no form of a tensor")
        return torch.empty((), dtype=DTYPES[dtype]).expand(shape)

    match decoded(form, tensor):
        case [tuple(inputs), dict(named)] if all(isinstance(name, str) for name in named):
            return inputs, named
    raise ValueError(f"{str(form)[:80]} is no form of arguments")


def arguments_for(signature: Signature) -> tuple[tuple, dict[str, object]]:
    """Returns arguments with a signature: normal numbers in tensors of floating point, zeros in others.

    Raises:
        ValueError: if it holds something that a file cannot.
    """

    def build(form: tuple) -> object:
        kind, *rest = form
        if kind is Tensor:
            shape, dtype, device = rest
            if device != "cpu":
                raise ValueError(f"it takes a tensor on {device}")
            return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        if kind is dict:
            return {key: build(item) for key, item in rest}
        if kind in (list, tuple):
            return kind(map(build, rest))
        if kind in _CONSTANTS:
            return rest[0]
        raise ValueError(f"it takes an argument of the type {kind.__name__}, which a file cannot hold")

    inputs, named = map(build, signature)
    return inputs, named
