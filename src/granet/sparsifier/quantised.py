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
        table: the number of each code, in ascending order, before it is scaled.
        scales: a factor for each block of so many codes, in their order.
    """

    codes: Tensor
    zero: int
    table: Tensor | None = None
    scales: Tensor | None = None

    @property
    def block(self) -> int:
        """The number of codes in a block: the smallest power of two that makes as many blocks as there are scales."""
        size = 1
        while -(-self.codes.numel() // size) > self.scales.numel():
            size *= 2
        return size


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
    return Codes(value, zeros[0], table, state.get(key.replace("state", "absmax")))


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


def numbers(tensor: Tensor | Codes) -> Tensor | None:
    """The numbers of a buffer, of the weight's shape; None where a scale is missing. A plain tensor is given back."""
    if not isinstance(tensor, Codes):
        return tensor.dequantize() if is_quantised(tensor) else tensor
    if tensor.scales is None:
        return None
    scales = tensor.scales.repeat_interleave(tensor.block)[: tensor.codes.numel()]
    return tensor.table[tensor.codes.long()] * scales.view(tensor.codes.shape)


@torch.no_grad()
def put(tensor: Tensor | Codes, values: Tensor) -> None:
    """Have a buffer hold `values`, as closely as it can; numbers that it held already stay what they were.

    A block of codes whose largest number grows is rounded anew.
    """
    if not isinstance(tensor, Codes):
        tensor.copy_(values)
        return
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % tensor.block))
    blocks = flat.view(-1, tensor.block)
    tensor.scales.copy_(torch.maximum(tensor.scales, blocks.abs().amax(1)))
    parts = (blocks / tensor.scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[: values.numel()]
    middles = (tensor.table[1:] + tensor.table[:-1]) / 2
    tensor.codes.copy_(torch.bucketize(parts, middles).view(values.shape))
