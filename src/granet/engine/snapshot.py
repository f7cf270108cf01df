"""Calling a model without leaving a trace in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Gives the model's attributes, buffers, lists and dicts, and torch's random state, back as they were.

    Hooks run as in any call; what they do elsewhere is not undone.
    """
    tensors: dict[int, tuple[Tensor, Tensor, int | None]] = {}
    containers: dict[int, tuple[list | dict | set | deque, list]] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            if id(value) not in tensors and not isinstance(value, nn.Parameter) and value.device.type != "meta":
                tensors[id(value)] = value, value.detach().clone(), _version(value)
        elif type(value) in (list, dict, set, deque, tuple) and id(value) not in containers:
            if type(value) is not tuple:
                containers[id(value)] = value, list(value.items() if type(value) is dict else value)
            for item in value.values() if type(value) is dict else value:
                visit(item)

    for module in model.modules():
        visit(vars(module))
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for value, before in containers.values():
                _restore(value, before)
            with torch.no_grad():
                for tensor, before, version in tensors.values():
                    if version is None or tensor._version != version:
                        tensor.copy_(before)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _restore(value: list | dict | set | deque, before: list) -> None:
    now = list(value.items() if isinstance(value, dict) else value)
    flat = (lambda items: [part for item in items for part in item]) if isinstance(value, dict) else list
    if [id(part) for part in flat(now)] != [id(part) for part in flat(before)]:
        value.clear()
        value.update(before) if isinstance(value, dict | set) else value.extend(before)
