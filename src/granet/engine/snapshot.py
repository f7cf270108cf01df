"""Calls of a model that leave no trace in it."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextmanager
def untouched(*holders: object) -> Iterator[None]:
    """Restores models and other objects, and torch's random state, when the block ends.

    Everything that can be reached from the holders is restored: attributes, buffers, lists, dicts, sets, and the
    attributes of objects of any class, a cache for example. The values of parameters are not restored, nor are objects
    of torch's and of the standard library. Hooks run as in any call; their effects elsewhere are not undone.
    """
    tensors: dict[int, tuple[Tensor, Tensor, int | None]] = {}
    containers: dict[int, tuple[Any, list]] = {}
    ahead, seen = list(holders), {}
    while ahead:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # held, so that no other object gets its id
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and value.device.type != "meta":
                tensors[id(value)] = value, value.detach().clone(), _version(value)
        elif type(value) in _CONTAINERS:
            containers[id(value)] = value, list(value.items() if isinstance(value, dict) else value)
            ahead += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            ahead += value
        elif _keeps_state(value):
            ahead.append(vars(value))
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


def _keeps_state(value: object) -> bool:
    """Returns whether a value is a module or an object of a class that is neither torch's nor the standard library's.

    Those two have objects that the whole process shares, loggers for example.
    """
    if isinstance(value, nn.Module):
        return True
    origin = type(value).__module__.partition(".")[0]
    return isinstance(getattr(value, "__dict__", None), dict) and origin not in sys.stdlib_module_names | {"torch"}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _restore(value: Any, before: list) -> None:
    now = list(value.items() if isinstance(value, dict) else value)
    flat = (lambda items: [part for item in items for part in item]) if isinstance(value, dict) else list
    if [id(part) for part in flat(now)] != [id(part) for part in flat(before)]:
        value.clear()
        value.update(before) if isinstance(value, dict | set) else value.extend(before)
