"""Dense tensors for the gradients of sparse weights.

A gradient is as large as the weight, and mostly zero. Making a new one takes longer than computing the gradient of a
very sparse linear layer, so the memory of the last one is used again as soon as nobody holds it any more.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from granet.engine import eager


@dataclass(frozen=True)
class _Buffer:
    """The memory of a gradient that was handed out.

    Attributes:
        tensor: the gradient; it has a version in common with the tensor that was handed out, and its memory.
        version: its version after the values were written. Where it is still the same, all other entries are zero.
        index: the places of the values.
    """

    tensor: Tensor
    version: int
    index: Tensor

    def is_free(self) -> bool:
        """Returns whether nobody else holds the memory, in this process or in another one."""
        return _uses(self.tensor) == _USES_ALONE and not self.tensor.is_shared()


def _uses(tensor: Tensor) -> tuple[int, int]:
    """Returns how many tensors and how many Python objects refer to the memory of a tensor."""
    storage = tensor.untyped_storage()  # one object as long as anybody keeps it, which torch's own count leaves out
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


_USES_ALONE = _uses(torch.empty(1))
_buffers = WeakTensorKeyDictionary()  # the last gradient of each weight


def in_memory_order(weight: Tensor, *, channels_last: bool) -> Tensor:
    """Returns the numbers of a weight as a contiguous tensor: in channels_last format the channels are innermost.

    It is a view of the weight if that is the format of the weight.
    """
    return (weight.permute(0, 2, 3, 1) if channels_last else weight).contiguous()


def dense(values: Tensor, index: Tensor, weight: Tensor, *, channels_last: bool = False) -> Tensor:
    """Returns the gradient of a weight: `values` at the places `index` of its memory, zero elsewhere.

    The gradient has the memory format that `index` counts in: contiguous, or channels_last.

    The tensor belongs to the caller. It has memory of its own as long as anything refers to it: the parameter's
    `.grad`, a view, an array.
    """
    if not eager.plain() or torch._C._functorch.is_legacy_batchedtensor(values):
        flat = values.new_zeros(weight.numel()).index_copy(0, index.long(), values)
        if not channels_last:
            return flat.view(weight.shape)
        outputs, channels, *kernel = weight.shape
        return flat.view(outputs, *kernel, channels).permute(0, 3, 1, 2)
    last = _buffers.pop(weight, None)  # popped, so that no other thread takes it as well
    numbers = functools.partial(in_memory_order, channels_last=channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    if (
        last is None
        or last.tensor.shape != weight.shape
        or not last.tensor.is_contiguous(memory_format=wanted)
        or not last.is_free()
    ):
        tensor = torch.zeros_like(weight, dtype=values.dtype, memory_format=wanted)
    else:
        tensor = last.tensor
        if tensor._version != last.version:  # somebody has changed it since: the sparsifier, or an accumulation
            tensor.zero_()
        elif last.index is not index:
            torch.ops.granet.place_values(numbers(tensor), torch.zeros(len(last.index)), last.index)
    torch.ops.granet.place_values(numbers(tensor), values, index)
    given = tensor.detach()
    _buffers[weight] = _Buffer(tensor, tensor._version, index)
    return given
