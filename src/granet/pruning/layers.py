"""A layer as one-shot pruning sees it: a matrix of outputs by inputs, and the second moment of what goes in."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granet import shards
from granet.filters import Filters, by_default, listed
from granet.names import described
from granet.pattern import NM
from granet.selection import owners, select
from granet.sparsifier import ownership


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that is to be pruned.

    Attributes:
        name: its name in `model.named_parameters()`.
        parameter: the weight.
        modules: the modules that have it: one, unless it is tied.
    """

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with outputs first and inputs second."""
        shape = tuple(self.parameter.shape)
        return shape[::-1] if _transposed(self.modules[0]) else shape

    @property
    def columns(self) -> int:
        """The number of inputs of one output."""
        return prod(self.shape[1:])

    def matrix(self) -> Tensor:
        """Returns the weight as (outputs, inputs), in float32 at least, a copy; kernel positions before channels."""
        weight = self.parameter.detach()
        weight = weight.t() if _transposed(self.modules[0]) else weight.movedim(1, -1).flatten(1)
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Puts a matrix of the form of `matrix()` in the place of the weight."""
        if _transposed(self.modules[0]):
            self.parameter.copy_(matrix.t())
        else:
            outputs, inputs, *kernel = self.shape
            self.parameter.copy_(matrix.view(outputs, *kernel, inputs).movedim(-1, 1))


def targets(model: nn.Module, only: Filters, skip: Filters, pattern: NM | None, calibrated: bool) -> list[Target]:
    """Returns the weights to be pruned, in the order of `named_parameters()`.

    By default those that `granet.plan` shows as sparse, and the transposed linear layers of transformers' GPT-2, but
    not the output layer of a language model.

    Args:
        model: the model.
        only: filters of what is pruned; see `granet.selection`.
        skip: filters of what stays dense.
        pattern: the pattern, or None.
        calibrated: whether their inputs are to be observed.

    Raises:
        TypeError: the model is none, or `only` or `skip` is no filter.
        ValueError: as for `granet.selection.select`; or a weight cannot obey the pattern, is sharded, or is of a kind
            of layer whose inputs cannot be observed; or a sparsifier is training it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is {described(model)}, and a torch.nn.Module is needed")
    owned = owners(model)
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    if only is None:
        skip = [*listed("skip", skip), *_head(model)]
        if any(isinstance(module, conv1d) for module in model.modules()):
            training = any(parameter.requires_grad for parameter in model.parameters())
            usual = [entries[0][0] for entries in owned.values() if by_default(entries, training).sparse]
            only = [conv1d, *usual]
    choices = [choice for choice in select(model, only, skip) if choice.sparse and choice.parameter.dim() > 1]
    found = [
        Target(choice.name, choice.parameter, tuple(module for _, module, _ in owned[id(choice.parameter)]))
        for choice in choices
    ]
    if any(owner.attached for owner in ownership.owners(target.parameter for target in found)):
        raise ValueError(
            "a sparsifier that is attached to an optimizer keeps this model sparse: call its detach() first"
        )
    for target in found:
        _check(target, pattern, calibrated)
    return found


def _head(model: nn.Module) -> list[str]:
    """The name of the weight of a language model's output layer, if there is one."""
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    return [f"{name}.weight" for name, module in model.named_modules() if module is head and hasattr(head, "weight")]


def _check(target: Target, pattern: NM | None, calibrated: bool) -> None:
    name, shape = target.name, tuple(target.parameter.shape)
    advice = f"leave it dense with skip={name!r}"
    if shards.is_sharded(target.parameter) or target.parameter.is_meta:
        where = "on the meta device" if target.parameter.is_meta else "sharded over ranks"
        raise ValueError(
            f"{name!r} is {where}: one-shot pruning needs the whole weight, so gather it first, or {advice}"
        )
    why = pattern.misfit(target.shape) if pattern else None
    if why:
        raise ValueError(f"{name!r} of shape {shape} cannot obey pattern {pattern}: {why}. {advice.capitalize()}")
    if not target.parameter.isfinite().all():
        raise ValueError(f"{name!r} has weights that are NaN or infinite: load a sound checkpoint, or {advice}")
    if calibrated:
        for one in target.modules:
            if isinstance(one, nn.Conv2d) and one.groups > 1:
                raise ValueError(
                    f"{name!r} is of a convolution with {one.groups} groups, whose inputs are not observed: {advice}, "
                    "or choose the method 'magnitude' without calibration"
                )
            if not isinstance(one, nn.Linear | nn.Conv2d) and not _transposed(one):
                raise ValueError(
                    f"{name!r} is of a {type(one).__name__}, and inputs are observed of Linear, Conv2d and "
                    f"transformers' Conv1D alone: {advice}, or choose the method 'magnitude' without calibration"
                )


def _transposed(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2, whose weight has inputs first."""
    return isinstance(module, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))


def tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Returns what a layer multiplies its matrix with, of shape (tokens, inputs); a convolution's in its patches."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    x = x if x.dim() == 4 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(x, module.kernel_size, module.dilation, stride=module.stride)
    return patches.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


class Moment:
    """The second moment of a layer's inputs, the mean of `x xᵀ` over all tokens that it has seen.

    Args:
        target: the layer.
        diagonal: whether the diagonal alone is wanted.
    """

    def __init__(self, target: Target, diagonal: bool = False):
        weight = target.parameter
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = (target.columns,) if diagonal else (target.columns, target.columns)
        self.name, self.count = target.name, 0
        self._sum = torch.zeros(size, dtype=dtype, device=weight.device)

    def add(self, x: Tensor) -> None:
        """Counts tokens in, of shape (tokens, inputs)."""
        x = x.detach().to(self._sum)
        self._sum += x.square().sum(0) if self._sum.dim() == 1 else x.t() @ x
        self.count += len(x)

    def mean(self) -> Tensor:
        """Returns the second moment, or its diagonal; of a layer that saw no token the identity: all inputs alike.

        Raises:
            ValueError: an input was NaN or infinite.
        """
        if not self.count:
            return torch.eye(len(self._sum)).to(self._sum) if self._sum.dim() == 2 else torch.ones_like(self._sum)
        found = self._sum / self.count
        if not found.isfinite().all():
            raise ValueError(
                f"the inputs of {self.name!r} are NaN or infinite, or their squares overflow, on the calibration data: "
                "look for the batch, or load the model in a wider dtype such as bfloat16 or float32"
            )
        return found


@contextmanager
def observed(watched: Sequence[Target], diagonal: bool = False):
    """Gives the moments of layers by name, which fill while the model runs inside the `with`."""
    moments = {target.name: Moment(target, diagonal) for target in watched}

    def look(moment: Moment, module: nn.Module, args: tuple, kwargs: Mapping) -> None:
        moment.add(tokens(module, args[0] if args else next(iter(kwargs.values()))))

    handles = [
        module.register_forward_pre_hook(partial(look, moments[target.name]), with_kwargs=True)
        for target in watched
        for module in target.modules
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def error(dense: Tensor, pruned: Tensor, moment: Tensor) -> float:
    """The change of a layer's outputs, `||(W - W') X|| / ||W X||` in Frobenius norms, from the second moment of X."""
    change, whole = (float(((one @ moment) * one).sum().clamp(min=0).sqrt()) for one in (dense - pruned, dense))
    return change / whole if whole else change
