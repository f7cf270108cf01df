"""Optimizer state in few bits: numbers kept in a format of their own, and how to clear some of them.

Two formats are known: tensor subclasses that give out their numbers and take numbers in, as torchao has them, and
integers that are places in a table, as bitsandbytes has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Codes:
    """Numbers kept as places in a table, one code a weight.

    Attributes:
        codes: integers of the weight's shape.
        zero: the code of the number 0.
    """

    codes: Tensor
    zero: int


def found(key: str, value: Tensor, state: Mapping[str, Any]) -> Tensor | Codes:
    """A buffer of an optimizer as something that can be cleared: `state[key]` itself, or its codes.

    Raises:
        ValueError: it holds codes, and there is no table that says which of them is zero.
    """
    if value.is_floating_point():
        return value
    table = state.get(key.replace("state", "qmap")) if key.startswith("state") else None
    zeros = () if table is None else (table == 0).nonzero().flatten().tolist()
    if not zeros:
        raise ValueError(
            f"the optimizer's {key!r} is {value.dtype}, one for each weight, and which of them means zero is unknown: "
            "what it remembers of inactive weights could not be cleared. Choose another optimizer"
        )
    return Codes(value, zeros[0])


def is_quantised(tensor: Tensor | Codes) -> bool:
    """Whether the bits of `tensor` are not those of its numbers."""
    return isinstance(tensor, Codes) or is_traceable_wrapper_subclass(tensor)


def nonzero(tensor: Tensor | Codes) -> Tensor:
    """Where the numbers are not zero: a bool tensor of the weight's shape."""
    return tensor.codes != tensor.zero if isinstance(tensor, Codes) else tensor.dequantize() != 0


@torch.no_grad()
def clear(tensor: Tensor | Codes, inactive: Tensor) -> None:
    """Set the numbers to zero where `inactive` is True.

    Raises:
        ValueError: the format has no zero.
    """
    if isinstance(tensor, Codes):
        tensor.codes.masked_fill_(inactive, tensor.zero)
        return
    tensor.copy_(tensor.dequantize().masked_fill_(inactive, 0))
    if nonzero(tensor).logical_and_(inactive).any():
        raise ValueError(
            f"{type(tensor).__name__} cannot hold an exact zero, so the optimizer would go on remembering inactive "
            "weights. Choose one whose state has 8 bits or more"
        )
