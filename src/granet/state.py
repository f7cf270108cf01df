"""What goes out of a sparsifier and comes back in: its state, and masks from elsewhere, checked."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from granet import distributed, masking
from granet.methods.base import Method
from granet.pattern import Pattern
from granet.probe import Probe
from granet.topology import count

_KEYS = {"method", "pattern", "step", "version", "overdue", "folded", "rng", "masks", "ever", "gradients", "memory"}


def checked_masks(
    masks: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    pattern: Pattern | None = None,
    method: Method | None = None,
) -> dict[str, Tensor]:
    """Copies of `masks` in the order of `parameters`.

    Raises:
        ValueError: a name is missing or unknown, or a mask is no bool tensor of its parameter's shape, or is empty,
            or does not obey the pattern; or the method finds its masks by training alone.
    """
    if method is not None and method.reparameterizes and method.sparsity_at(0) is None:
        raise ValueError(f"{type(method).__name__} finds its masks by training: it cannot start from masks=")
    if set(masks) != set(parameters):
        name = sorted(set(masks) ^ set(parameters))[0]
        raise ValueError(f"masks: {name!r} is " + ("no sparse parameter of the model" if name in masks else "missing"))
    for name, p in parameters.items():
        mask = masks[name]
        if mask.dtype != torch.bool or mask.shape != p.shape:
            raise ValueError(
                f"masks: {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"torch.bool of shape {tuple(p.shape)} is needed"
            )
        if not count(mask):
            raise ValueError(f"masks: {name!r} has no active weight; a layer needs at least one")
        if pattern and not pattern.obeyed(mask):
            raise ValueError(f"masks: {name!r} does not obey pattern {pattern}")
    return {name: masks[name].clone() for name in parameters}


def needed(probe: Probe | None, method: Method, parameters: Mapping[str, Tensor]) -> tuple[Probe, ...]:
    """What the method's `init` is given beside layers and generator: the probe, or nothing.

    Raises:
        ValueError: the method needs one, and there is none, or it would look at shards.
    """
    if not method.needs_probe:
        return ()
    kind = type(method).__name__
    if any(map(distributed.is_sharded, parameters.values())):
        raise ValueError(
            f"{kind} looks at gradients before training, through a whole network, and this one is sharded: choose the "
            "masks before, in the same way on all ranks, and take them over: Sparsifier(..., masks=masks)"
        )
    if probe is None:
        raise ValueError(
            f"{kind} looks at gradients before training: give Sparsifier(...) a probe=granet.Probe(model, batches)"
        )
    return (probe,)


def refuse_foreign(
    state: Mapping[str, Any], method: Method, masks: Mapping[str, Tensor], pattern: Pattern, *, folded: bool
) -> None:
    """Refuse a sparsifier's state that is not of this method, this pattern and these masks' shapes.

    Raises:
        ValueError: says what differs.
    """
    missing = _KEYS - set(state)
    if missing:
        raise ValueError(f"this is no state of a sparsifier, or a damaged one: it has no {', '.join(sorted(missing))}")
    if state["method"] != repr(method):
        raise ValueError(f"the state is of {state['method']}, this sparsifier runs {method!r}")
    if state["pattern"] != str(pattern):
        raise ValueError(f"the state obeys pattern {state['pattern']}, this sparsifier {pattern}")
    if state["folded"] != folded:
        raise ValueError(
            "the state was taken after fold(): call fold() on this sparsifier too, before the model's state is loaded"
            if state["folded"]
            else "the state was taken before fold(): load it into a sparsifier that is not folded"
        )
    for name, mask in (*state["masks"].items(), *state["ever"].items()):
        if mask.dtype != torch.bool:
            raise ValueError(f"this is a damaged state of a sparsifier: the mask of {name!r} is {mask.dtype}")
    shapes = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
    mine = {name: tuple(mask.shape) for name, mask in masks.items()}
    if shapes != mine:
        name, shape = sorted(set(shapes.items()) ^ set(mine.items()))[0]
        raise ValueError(f"the state is of another model: {name!r} of shape {shape} is only in one of them")


def packed(parts: Mapping[str, Mapping[str, Tensor]], **rest: Any) -> dict[str, Any]:
    """A sparsifier's state: copies of the tensors in `parts`, and the rest."""
    return rest | {key: {name: tensor.clone() for name, tensor in part.items()} for key, part in parts.items()}


def unpacked(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Copies of the masks, what was ever active, kept gradients and memory in `state`, placed as `parameters` are.

    Whole tensors go into shards and shards into whole ones; for the latter all ranks must call this together.
    """

    def mine(name: str, value: Tensor) -> Tensor:
        p = parameters.get(name)
        if p is None or value.shape != p.shape:
            return value.clone()
        return (masking.like if value.dtype == torch.bool else distributed.placed)(value, p).clone()

    parts = (state[key] for key in ("masks", "ever", "gradients", "memory"))
    return [{name: mine(name, value) for name, value in part.items()} for part in parts]
