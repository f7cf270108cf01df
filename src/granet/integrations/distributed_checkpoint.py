"""Sharded checkpoints: a model, its optimizers and its sparsifier by torch.distributed.checkpoint.

Every rank writes its own shards, and any number of ranks reads them back: what two wrote goes on with four, or with
one process that shards nothing. All ranks must call these functions together.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from granet.ranks import current
from granet.sparsifier import Sparsifier, attachment


def save(
    folder: Path | str, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], sparsifier: Sparsifier
) -> None:
    """Write `{"model", "optimizer", "sparsifier"}` into `folder`, under the names of the dense, unsharded model."""
    with _alone(), current().together():
        dcp.save(_state(model, optimizers, sparsifier), checkpoint_id=folder)


def load(
    folder: Path | str, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], sparsifier: Sparsifier
) -> None:
    """Continue where `save` was called: model, optimizers and sparsifier are changed in place.

    Raises:
        ValueError: the sparsifier's state is of another method or another model; model and optimizers are then spoilt.
        torch.distributed.checkpoint.CheckpointException: a part cannot be read, or is of another model.
        RankError: another rank failed; the message is that of its error.
    """
    with _alone(), current().together():
        state = _state(model, optimizers, sparsifier)
        state["sparsifier"] |= _kept(folder, dict(model.named_parameters()))
        dcp.load(state, checkpoint_id=folder)
        with attachment.unhooked(optimizers):
            set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        sparsifier.load_state_dict(state["sparsifier"])


@contextmanager
def _alone() -> Iterator[None]:
    """One process without a group is as good as any other number: torch need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _state(model, optimizers, sparsifier) -> dict[str, Any]:
    every = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    new = [optimizer for optimizer in every if not optimizer.state]
    # torch fills the state of a new optimizer by a step that changes nothing: it is no step of training, and undone
    with attachment.unhooked(optimizers):
        weights, buffers = get_state_dict(model, optimizers)
    for optimizer in new:
        optimizer.state.clear()
    return {"model": weights, "optimizer": buffers, "sparsifier": sparsifier.state_dict()}


def _kept(folder: Path | str, parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors to be filled with what the sparsifier of the checkpoint kept from step to step: `gradients`, `memory`.

    A checkpoint fills only what there is a place for, and a new sparsifier has kept nothing yet.
    """
    found: dict[str, dict[str, torch.Tensor]] = {"gradients": {}, "memory": {}}
    metadata = current().decide(lambda: dcp.FileSystemReader(folder).read_metadata())
    for key, (part, *path) in metadata.planner_data.items():
        if part == "sparsifier" and path[0] in found:
            kind, name = path
            stored, p = metadata.state_dict_metadata[key], parameters.get(name)
            like = p is not None and p.shape == stored.size
            empty = torch.empty_like(p.detach()) if like else torch.empty(stored.size)
            found[kind][name] = empty.to(stored.properties.dtype)
    return found
