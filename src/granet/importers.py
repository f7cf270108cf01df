"""Masks from elsewhere: `torch.nn.utils.prune`, `torch.ao.pruning`, or a dict of masks from anybody's code.

What comes back goes to `Sparsifier(model, method, masks=...)`; a network whose zeros say it all needs nothing but
`granet.Fixed()`. `torch.ao.pruning` itself is not imported: what it leaves in a model is recognised by its shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from granet.filters import Filters
from granet.names import forms, matched, nearest
from granet.selection import select


@torch.no_grad()
def import_masks(
    model: nn.Module, given: Mapping[str, Any] | None = None, *, only: Filters = None, skip: Filters = ()
) -> dict[str, Tensor]:
    """The masks of a pruned model, by parameter name, True = active; sparse parameters without one are all active.

    Args:
        model: the model. If it carries masks itself, as `torch.nn.utils.prune` and a prepared `torch.ao.pruning` model
            do, it is turned back into a plain one: pruned weights become zeros, the parameters keep their identity.
        given: masks as bool or 0/1 tensors, named like the parameters, with or without `module.` in front and `_mask`
            behind; or a state dict that has such; or the state of a `torch.ao.pruning` sparsifier. None: the model's.
        only: filters of what is sparse, as for the `Sparsifier`; see `granet.selection`.
        skip: filters of what stays dense.

    Raises:
        ValueError: there are no masks, or one has no parameter, another shape than it, or other values than 0 and 1;
            or it is of a parameter that `only` and `skip` leave dense. The model's own masks are then where they were.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    >>> _ = prune.random_unstructured(model[0], "weight", amount=6)
    >>> masks = import_masks(model)
    >>> {name: int(mask.sum()) for name, mask in masks.items()}, list(model.state_dict())
    ({'0.weight': 2, '1.weight': 6}, ['0.bias', '0.weight', '1.weight', '1.bias'])
    """
    undo: list[Callable[[], None]] = []
    try:
        return _chosen(model, _taken_from(model, undo) if given is None else _tensors(given), given, only, skip)
    except ValueError:
        for step in undo:
            step()
        raise


def _chosen(model: nn.Module, found: Mapping[str, Any], given, only, skip) -> dict[str, Tensor]:
    """A mask for every sparse parameter, those that were found checked."""
    if not found:
        raise ValueError(
            f"{type(model).__name__} carries no masks of torch.nn.utils.prune or torch.ao.pruning; give them as a "
            "dict, or keep the zeros that it has with granet.Fixed()"
            if given is None
            else "there are no masks in what was given"
        )
    choices = {name: choice for choice in select(model, only, skip) for name in (choice.name, *choice.aliases)}
    masks = {
        choice.name: torch.ones_like(choice.parameter, dtype=torch.bool) for choice in choices.values() if choice.sparse
    }
    for key, value in found.items():
        name = _named(key, choices)
        choice = choices[name]
        mask = _checked(name, value, choice.parameter)
        if choice.sparse:
            masks[choice.name] = mask
        elif not mask.all():
            raise ValueError(
                f"{name!r} has a mask, and stays dense: {choice.reason}. Name it in only=, or leave the mask out"
            )
    return masks


def _taken_from(model: nn.Module, undo: list[Callable[[], None]]) -> dict[str, Tensor]:
    """The masks that lie in the model, which is a plain one afterwards; what puts each back is appended to `undo`."""
    found: dict[str, Tensor] = {}
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        for leaf in [key.removesuffix("_mask") for key in module._buffers if key.endswith("_mask")]:
            if f"{leaf}_orig" in module._parameters:
                mask = found[prefix + leaf] = module._buffers[f"{leaf}_mask"].clone()
                undo.append(partial(_prune_again, module, leaf, mask, module._parameters[f"{leaf}_orig"].clone()))
                prune.remove(module, leaf)
        if not parametrize.is_parametrized(module):
            continue
        for leaf, steps in list(module.parametrizations.items()):
            masked = [step for step in steps if isinstance(getattr(step, "mask", None), Tensor)]
            if not masked:
                continue
            if len(steps) > 1:
                others = ", ".join(type(step).__name__ for step in steps if step is not masked[0])
                raise ValueError(f"{prefix}{leaf} is parametrized by {others} too: remove that first")
            found[prefix + leaf] = masked[0].mask.clone()
            undo.append(partial(_mask_again, module, leaf, masked[0], steps.original.clone()))
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
    return found


def _prune_again(module: nn.Module, leaf: str, mask: Tensor, dense: Tensor) -> None:
    prune.custom_from_mask(module, leaf, mask)
    module._parameters[f"{leaf}_orig"].copy_(dense)


def _mask_again(module: nn.Module, leaf: str, step: nn.Module, dense: Tensor) -> None:
    parametrize.register_parametrization(module, leaf, step)
    module.parametrizations[leaf].original.copy_(dense)


def _tensors(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks in a dict of masks, a state dict with masks, or the state of a `torch.ao.pruning` sparsifier."""
    if "state" in given and "groups" in given:
        return {name: entry["mask"] for name, entry in given["state"].items() if "mask" in entry}
    marked = {key: value for key, value in given.items() if re.search(r"[_.]mask$", key)}
    # in the state dict of a pruned model other buffers may be called masks, those of attention for example
    pruned = {key: value for key, value in marked.items() if f"{key[:-5]}_orig" in given or "parametrizations." in key}
    return dict(pruned or marked or given)


def _named(key: str, known: Mapping[str, Any]) -> str:
    """The parameter's name that `key` stands for."""
    name = re.sub(r"\.?parametrizations\.(\w+)\.\d+\.mask$", r".\1", key).lstrip(".")
    name = re.sub(r"[_.]mask$", "", name)
    name = matched([name], known).get(name, next(reversed(list(forms(name)))))
    if name in known:
        return name
    if f"{name}.weight" in known:
        return f"{name}.weight"
    near = nearest(name, known, 3)
    raise ValueError(
        f"the mask {key!r} is of no parameter of the model"
        + (f"; the nearest names are: {', '.join(near)}" if near else "")
    )


def _checked(name: str, value: Any, parameter: nn.Parameter) -> Tensor:
    value = torch.as_tensor(value)
    if value.shape != parameter.shape:
        raise ValueError(f"the mask of {name!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
    mask = value != 0
    if not torch.equal(mask.to(value.dtype), value):
        raise ValueError(f"the mask of {name!r} has other values than 0 and 1: give bool tensors, or zeros and ones")
    return mask.to(parameter.device)
