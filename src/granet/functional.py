"""Calling a model with other tensors in the place of its own."""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def called_with(
    model: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: Mapping[str, Any] | None = None
) -> Any:
    """What `model` returns with `tensors` as its parameters and buffers; the model itself stays as it is.

    `functional_call` by itself leaves its own tensors in a module that stands under two names. Here each module is
    named once, and a tied parameter gets the same tensor wherever it is.

    Args:
        model: any module.
        tensors: one for every name of `named_parameters()` and `named_buffers()`.
        args: a tuple of arguments, or the only one.
        kwargs: arguments by keyword.
    """
    first = {id(tensor): name for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    given = {}
    for path, module in model.named_modules():
        for leaf, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                given[f"{path}.{leaf}" if path else leaf] = tensors[first[id(tensor)]]
    return functional_call(model, given, args, kwargs, tie_weights=False)


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy of a model.

    Raises:
        ValueError: it cannot be copied; the message says what most often stands in the way.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # of tensors that are results
        raise ValueError(
            f"the model cannot be copied: {error}. If torch.nn.utils.prune computes weights in it, call prune.remove"
        ) from error
