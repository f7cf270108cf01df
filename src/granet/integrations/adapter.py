"""granet inside other people's training loops: one thin adapter a stack, each with an extra of its own.

Adapters call a `Sparsifier` at the right moments and save its state with the run; they decide nothing. See
docs/integrations.md for the stacks that need none.
"""

import torch

from granet import shards
from granet.methods.base import Method
from granet.sparsifier import Sparsifier


def ready_made(method: Method | Sparsifier, options: dict) -> Sparsifier | None:
    """The sparsifier that an adapter was given, None if it is to make one by a method and its options.

    Raises:
        ValueError: options come with a sparsifier that is made already.
    """
    if not isinstance(method, Sparsifier):
        return None
    if options:
        raise ValueError(f"give {', '.join(options)} to the Sparsifier: it is made already")
    return method


def unsharded_state(state: dict) -> dict:
    """A sparsifier's state in plain CPU tensors, to be written by one rank; all ranks call this together."""
    cpu = torch.empty(0)

    def unsharded(part):
        return {name: shards.place_like(value, cpu) for name, value in part.items()} if isinstance(part, dict) else part

    return {key: unsharded(part) for key, part in state.items()}
