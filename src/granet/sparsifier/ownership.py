"""Which sparsifier parameters belong to: at most one keeps them sparse, and no optimizer moves them unseen.

A sparsifier acts in the steps of the optimizers attached to it. Optimizers that nobody attached are noticed by a hook
of torch's that every optimizer calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak reference to its sparsifier
_known: WeakKeyDictionary = WeakKeyDictionary()  # optimizer -> the state of the records when it was last checked
_watching: list = []
_changes = 0


def claim(sparsifier, parameters: Iterable[Tensor]) -> None:
    """Record that the parameters belong to the sparsifier from now on.

    Raises:
        ValueError: another sparsifier is attached to an optimizer that trains one of them.
    """
    parameters = list(parameters)
    for owner in owners(parameters):
        if owner is not sparsifier and owner.attached:
            raise ValueError(
                "another sparsifier that is attached to an optimizer keeps weights of this model sparse: call its "
                "detach() first, or let it go on alone"
            )
    for parameter in parameters:
        _owners[parameter] = ref(sparsifier)
    _changed()
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_look))


def release(sparsifier, parameters: Iterable[Tensor]) -> None:
    """Record that the parameters no longer belong to the sparsifier."""
    for parameter in parameters:
        if parameter in _owners and _owners[parameter]() is sparsifier:
            del _owners[parameter]
    _changed()


def owners(parameters: Iterable[Tensor]) -> list:
    """Returns the sparsifiers that the parameters belong to, each once."""
    found = {}
    for parameter in parameters:
        owner = _owners[parameter]() if parameter in _owners else None
        if owner is not None:
            found[id(owner)] = owner
    return list(found.values())


def _changed() -> None:
    global _changes
    _changes += 1


def _look(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Runs after every optimizer step: the sparsifiers that own the stepped parameters check the optimizer."""
    if torch.compiler.is_compiling():
        return
    now = _changes, len(optimizer.param_groups)
    if _known.get(optimizer) == now:
        return
    found = owners(p for group in optimizer.param_groups for p in group["params"])
    if all(owner.needs_no_more_checks(optimizer) for owner in found):
        _known[optimizer] = now
