"""A linear layer from its stored values: on granet's kernels, or with a few rows of its weight dense at a time.

The kernels read the values and their positions, and need no dense weight at all. Elsewhere, and where an update is to
see the dense gradient, the products are those of the whole weight, one block of outputs after the other: neither the
forward nor the backward needs memory for the dense weight or for its gradient, and a block is used while it is in the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granet import native
from granet.sparsifier.sparse_storage.values import bounds, dense

BLOCK = 1 << 20  # weights that are dense at a time
DENSEST = {torch.float32: 0.4, torch.bfloat16: 0.15}  # densities up to which the kernels win, by the type of products

Pieces = Iterable[tuple[int, Tensor]]  # flat index of its first entry, and consecutive entries of a dense gradient
Listener = Callable[[nn.Module, Pieces], None]


def is_for(module: nn.Module, shape: tuple[int, ...], x: object) -> bool:
    """Whether a linear layer in sparse storage computes by `apply`: it is large, or the kernels are faster."""
    return prod(shape) > BLOCK or (isinstance(x, Tensor) and _on_kernels(module, shape, x.device, _product_type(x)))


def apply(module: nn.Module, x: Tensor, shape: tuple[int, int], listener: Listener | None) -> Tensor:
    """Returns what the layer computes, through which gradients flow to its input, its values and its bias.

    Args:
        module: a linear layer in sparse storage.
        x: its input `(..., inputs)`.
        shape: that of its dense weight, `(outputs, inputs)`.
        listener: is given the pieces of the dense gradient in the backward, in order; None if nobody needs them.
    """
    bias, dtype = module.bias, _product_type(x)
    if dtype != x.dtype:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = _Linear.apply(x.reshape(-1, shape[1]), module.values, bias, module, shape, listener)
    return y.view(*x.shape[:-1], shape[0])


def _product_type(x: Tensor) -> torch.dtype:
    """The type in which torch computes a linear layer's products: that of autocast if it is on."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def _on_kernels(module: nn.Module, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute the layer: a matter of its density, so that a training resumes as it was."""
    values, positions = module.values, module.positions
    return (
        device.type == values.device.type == "cpu"
        and (values.dtype, positions.dtype) == (torch.float32, torch.int32)
        and len(positions) <= DENSEST.get(dtype, 0.0) * prod(shape)
        and native.available()
    )


class _Linear(torch.autograd.Function):
    """The products of a linear layer and their gradients."""

    @staticmethod
    def forward(ctx, x, values, bias, module, shape, listener):
        ctx.save_for_backward(x)
        ctx.weight = weight = _Weight(values, module.positions, shape, x.dtype)
        ctx.parameter, ctx.module, ctx.listener, ctx.biased = values, module, listener, bias is not None
        ctx.on_kernels = _on_kernels(module, shape, x.device, x.dtype)
        if ctx.on_kernels:
            start = None if bias is None else bias.float()
            y = torch.ops.granet.stored_forward(_numbers(x), weight.values, weight.positions, start, shape[0])
            return y.to(x.dtype)
        y = x.new_empty(len(x), shape[0])
        for rows, block in weight.blocks():
            torch.mm(x, block.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        ctx.weight.check()
        if torch.is_grad_enabled():  # the gradients are to have gradients
            return *_differentiable(ctx, dy, x), None, None, None
        if ctx.on_kernels and not (needs_values and ctx.listener):
            dx, taken = torch.ops.granet.stored_backward(
                _numbers(dy), _numbers(x), ctx.weight.values, ctx.weight.positions, needs_x, needs_values
            )
            dx, taken = dx.to(x.dtype) if needs_x else None, taken if needs_values else None
        else:
            dx, taken = _by_blocks(ctx, dy, x, needs_x, needs_values)
        return dx, taken, dy.sum(0) if needs_bias and ctx.biased else None, None, None, None


def _numbers(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it."""
    return tensor.float().contiguous()


def _by_blocks(ctx, dy: Tensor, x: Tensor, needs_x: bool, needs_values: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the values, block by block."""
    weight = ctx.weight
    dx = torch.zeros_like(x) if needs_x else None
    taken = torch.zeros_like(weight.values) if needs_values else None

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for rows, low, high in weight.ranges():
            start, d = rows.start * weight.shape[1], dy[:, rows]
            if dx is not None:
                dx.addmm_(d, weight.block(rows, low, high))
            if taken is not None:
                piece = torch.mm(d.t(), x).view(-1)
                taken[low:high] = piece[(weight.positions[low:high] - start).long()].to(taken.dtype)
                yield start, piece

    rest = pieces()
    if ctx.listener is not None and needs_values:
        ctx.listener(ctx.module, rest)
    for _ in rest:
        pass
    return dx, taken


def _differentiable(ctx, dy: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by operations that autograd can follow; one dense weight and one dense gradient for a while."""
    weight, (needs_x, needs_values, needs_bias, *_) = ctx.weight, ctx.needs_input_grad
    positions = weight.positions.long()
    flat = dy.new_zeros(weight.shape[0] * weight.shape[1])
    values = ctx.parameter[: len(positions)].to(flat.dtype)
    whole = flat.index_copy(0, positions, values).view(weight.shape)
    dx = dy @ whole if needs_x else None
    taken = None
    if needs_values:
        taken = (dy.t() @ x).reshape(-1)[positions].to(ctx.parameter.dtype)
        taken = F.pad(taken, (0, len(ctx.parameter) - len(taken)))
    return dx, taken, dy.sum(0) if needs_bias and ctx.biased else None


class _Weight:
    """The blocks of a dense weight, for as long as its values have not changed."""

    def __init__(self, values: Tensor, positions: Tensor, shape: tuple[int, int], dtype: torch.dtype):
        self.values, self.positions, self.shape, self.dtype = values.detach(), positions, shape, dtype
        self.version = values._version

    def check(self) -> None:
        """Raises RuntimeError if the values have changed."""
        if self.values._version != self.version:
            raise RuntimeError(CHANGED)

    def ranges(self) -> Iterator[tuple[slice, int, int]]:
        """Yields the rows of each block, and where its values begin and end."""
        outputs, inputs = self.shape
        size = max(1, BLOCK // inputs)
        firsts = [*range(0, outputs, size), outputs]
        ends = bounds(self.positions, [first * inputs for first in firsts])
        for i, first in enumerate(firsts[:-1]):
            yield slice(first, firsts[i + 1]), ends[i], ends[i + 1]

    def block(self, rows: slice, low: int, high: int) -> Tensor:
        """Returns some rows of the weight, dense."""
        places = self.positions[low:high] - rows.start * self.shape[1]
        return dense(self.values[low:high], places, (rows.stop - rows.start, self.shape[1]), self.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields all rows, block by block."""
        for rows, low, high in self.ranges():
            yield rows, self.block(rows, low, high)


CHANGED = (
    "the weights of a layer in sparse storage changed between its forward and its backward, which needs them as they "
    "were: call backward() before the optimizer's step"
)
