"""What of a model goes into a file, and into which tensors of a model a file is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from granet import __version__, shards
from granet.names import described
from granet.sparsifier import Sparsifier, ownership
from granet.storage.codec import count_nonzero

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
_MASKED = re.compile(r"(?:(?P<module>.*\.)?parametrizations\.(?P<leaf>[^.]+)\.original|(?P<name>.+)_orig)")


def bare(model: Any) -> Any:
    """Returns the model inside the wrappers of `torch.compile` and data-parallel training."""
    while (inner := _WRAPPERS.get(type(model).__name__)) and isinstance(getattr(model, inner, None), nn.Module):
        model = getattr(model, inner)
    return model


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Returns the tensors of a model by name: its weights as it computes with them, zero where they are masked.

    Masks of `torch.nn.utils.prune` and `torch.ao.pruning` are applied, and are not among the tensors.

    Args:
        model: a module, a `Sparsifier`, or a state dict.

    Raises:
        TypeError: it is something else.
        ValueError: a tensor cannot be stored: it is sharded, quantised, sparse by layout, or has no values yet.
    """
    model = bare(model)
    if isinstance(model, nn.Module):
        own = [owner for owner in _owners(model) if bare(owner.model) is model]
        found = own[0].plain_state_dict() if own else model.state_dict()
    elif isinstance(model, Sparsifier):
        found = model.plain_state_dict()
    elif isinstance(model, Mapping):
        found = dict(model)
    else:
        raise TypeError(f"{described(model)} was given: a model, a Sparsifier or a state dict is needed")
    for name, tensor in found.items():
        _refuse_strange(name, tensor)
    return _without_masks(found)


def about(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what is said of a model beside its tensors: granet's version, method, sparsity and pattern.

    Method and pattern are those of the sparsifier whose weights the model has; without one they are None, and the
    sparsity is the share of zeros among all matrices.
    """
    owners = _owners(model)
    values: dict[str, Any] = {"granet": __version__, "method": None, "sparsity": None, "pattern": None}
    if owners:
        active, total = (sum(getattr(owner, kind) for owner in owners) for kind in ("active", "total"))
        values["method"] = " + ".join(dict.fromkeys(repr(owner.method) for owner in owners))
        values["pattern"] = " + ".join(dict.fromkeys(str(owner.pattern) for owner in owners))
    else:
        matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1 and tensor.is_floating_point()]
        active = sum(map(count_nonzero, matrices))
        total = sum(tensor.numel() for tensor in matrices)
    return values | ({"sparsity": 1 - active / total} if total else {})


def targets_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a model's state dict, which share the model's memory.

    Raises:
        TypeError: it is no module.
        ValueError: a tensor cannot be written to, or is made anew by the model's `state_dict`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"into= is {described(model)}: a torch.nn.Module is needed")
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    targets = model.state_dict(keep_vars=True)
    for name, tensor in targets.items():
        _refuse_strange(name, tensor)
        if id(tensor) not in held:
            raise ValueError(
                f"{name!r} is no parameter or buffer of the model, whose state_dict() makes it: "
                "model.load_state_dict(granet.load(path)) loads into such a model"
            )
    return targets


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns for each name whose tensor is that of an earlier name, the earlier name.

    >>> weight = torch.ones(2, 2)
    >>> tied({"a": weight, "b": torch.ones(2, 2), "c": weight})
    {'c': 'a'}
    """
    first: dict[tuple, str] = {}
    found = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            layout = tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
            earlier = first.setdefault((tensor.data_ptr(), *layout), name)
            if earlier != name:
                found[name] = earlier
    return found


def tie(model: nn.Module, name: str, other: str) -> Callable[[], None]:
    """Returns what makes the parameter or buffer `name` of a model the one called `other`.

    Raises:
        ValueError: they differ in kind, dtype or device, and cannot be one.
    """
    (holder, leaf), (source, end) = _place(model, name), _place(model, other)
    one, two = holder[leaf], source[end]
    if (type(one), one.dtype, one.device) != (type(two), two.dtype, two.device):
        kinds = " and ".join(f"a {type(each).__name__} of {each.dtype} on {each.device}" for each in (one, two))
        raise ValueError(f"{name!r} and {other!r} are one tensor in the file, and in the model {kinds}")
    return partial(holder.__setitem__, leaf, two)


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Returns the dict of a module that holds a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def _owners(model: Any) -> list[Sparsifier]:
    if isinstance(model, Sparsifier):
        return [model]
    return ownership.owners(model.parameters()) if isinstance(model, nn.Module) else []


def _refuse_strange(name: str, tensor: Any) -> None:
    """Raises ValueError for what is no plain tensor with values."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name!r} is {described(tensor)}, and only tensors can be stored: leave it out")
    if shards.is_sharded(tensor):
        raise ValueError(
            f"{name!r} is sharded over ranks: gather the model first, or use granet.distributed_checkpoint"
        )
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name!r} has no shape yet: run the model once")
    if type(tensor) not in _PLAIN or tensor.is_quantized:
        raise ValueError(f"{name!r} is a {type(tensor).__name__}, and plain tensors are needed: dequantise it first")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name!r} has the layout {tensor.layout}: turn it into a dense tensor with to_dense()")
    if tensor.device.type == "meta":
        raise ValueError(f"{name!r} is on the meta device and has no values: model.to_empty(device='cpu') makes room")


def _without_masks(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with the masks that torch's pruning has put beside them applied, under plain names."""
    named: dict[str, tuple[str, Tensor]] = {}  # by the name in the state dict: the plain name, and the mask
    masks = set()
    for key in found:
        match = _MASKED.fullmatch(key)
        if match is None:
            continue
        name = match["name"] or f"{match['module'] or ''}{match['leaf']}"
        mask = f"{name}_mask" if match["name"] else f"{key.removesuffix('original')}0.mask"
        several = not match["name"] and any(other.startswith(f"{key.removesuffix('original')}1.") for other in found)
        if mask in found and found[mask].shape == found[key].shape and not several:
            named[key] = name, found[mask]
            masks.add(mask)
    plain = {}
    for key, tensor in found.items():
        if key in named:
            name, mask = named[key]
            plain[name] = tensor.detach().where(mask != 0, 0)
        elif key not in masks:
            plain[key] = tensor
    return plain
