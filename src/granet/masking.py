"""Masking in place: setting the inactive entries of tensors to exact zero, fast and without keeping NaN.

On the CPU an entry is cleared by a bitwise AND with all ones or all zeros, in pieces that stay in the cache: a fill
through a bool mask takes several times as long, and a multiplication keeps NaN and leaves -0.0.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_PIECE = 1 << 18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Work = Iterable[tuple[Tensor, Sequence[Tensor]]]


@torch.no_grad()
def clear(work: Work) -> None:
    """Set the entries of tensors to zero where their mask is False.

    Args:
        work: pairs of a bool mask and the tensors of its shape that it clears in place.
    """
    scratch: dict[torch.dtype, Tensor] = {}
    for mask, tensors in work:
        quick = [tensor for tensor in tensors if _same_layout(tensor, mask)]
        for bits in {_BITS[tensor.element_size()] for tensor in quick}:
            same = [_storage_order(tensor).view(bits) for tensor in quick if _BITS[tensor.element_size()] == bits]
            words = scratch.setdefault(bits, torch.empty(_PIECE, dtype=bits))
            pieces = [tensor.split(_PIECE) for tensor in same]
            for flags, *values in zip(_storage_order(mask).view(torch.int8).split(_PIECE), *pieces, strict=True):
                ones = words[: flags.numel()].copy_(flags).neg_()  # True: all bits set, False: none
                for value in values:
                    value.bitwise_and_(ones)
        for tensor in tensors:
            if not any(tensor is other for other in quick):
                tensor.masked_fill_(mask.logical_not(), 0)


@torch.no_grad()
def leaks(work: Work) -> bool:
    """Whether any tensor has a nonzero (or NaN) entry where its mask is False. Waits for the device."""
    return any(
        bool((tensor != 0).logical_and_(mask.logical_not()).any()) for mask, tensors in work for tensor in tensors
    )


def like(mask: Tensor, parameter: Tensor) -> Tensor:
    """`mask` on the parameter's device and in its memory layout (channels-last, say), so that clearing is fast."""
    if mask.device == parameter.device and mask.stride() == parameter.stride():
        return mask
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


def _same_layout(tensor: Tensor, mask: Tensor) -> bool:
    """Whether the bits of `tensor` can be walked along with `mask`: on the CPU, dense, real, in the same order."""
    return (
        tensor.device.type == "cpu"
        and all(a == b for a, b, n in zip(tensor.stride(), mask.stride(), mask.shape, strict=True) if n > 1)
        and tensor.is_floating_point()
        and torch.ops.aten.is_non_overlapping_and_dense(tensor)
    )


def _storage_order(tensor: Tensor) -> Tensor:
    """A view of a dense tensor with one dimension, in the order of its storage."""
    return tensor.as_strided((tensor.numel(),), (1,))
