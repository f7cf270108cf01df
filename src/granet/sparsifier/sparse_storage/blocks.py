"""A large linear layer from its stored values: a few rows of the weight, and of its gradient, are dense at a time.

The products are those of the whole weight, one block of outputs after the other. So neither the forward nor the
backward needs memory for the dense weight or for its gradient, and a block is used while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from granet.sparsifier.sparse_storage.values import bounds, dense

BLOCK = 1 << 20  # weights that are dense at a time; a layer of fewer is made dense as a whole

Pieces = Iterable[tuple[int, Tensor]]  # flat index of its first entry, and consecutive entries of a dense gradient
Listener = Callable[[nn.Module, Pieces], None]


def apply(module: nn.Module, x: Tensor, shape: tuple[int, int], listener: Listener | None) -> Tensor:
    """Returns what the layer computes, through which gradients flow to its input, its values and its bias.

    Args:
        module: a linear layer in sparse storage.
        x: its input `(..., inputs)`.
        shape: that of its dense weight, `(outputs, inputs)`.
        listener: is given the pieces of the dense gradient in the backward, in order; None if nobody needs them.
    """
    values, bias, kind = module.values, module.bias, x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = x.to(torch.get_autocast_dtype(kind))
        bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(kind, enabled=False):
        y = _Linear.apply(x.reshape(-1, shape[1]), values, bias, module, shape, listener)
    return y.view(*x.shape[:-1], shape[0])


class _Linear(torch.autograd.Function):
    """The products of a linear layer and their gradients, block by block."""

    @staticmethod
    def forward(ctx, x, values, bias, module, shape, listener):
        ctx.save_for_backward(x)
        ctx.weight = _Weight(values, module.positions, shape, x.dtype)
        ctx.parameter, ctx.module, ctx.listener, ctx.biased = values, module, listener, bias is not None
        y = x.new_empty(len(x), shape[0])
        for rows, block in ctx.weight.blocks():
            torch.mm(x, block.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight, (needs_x, needs_values, needs_bias, *_) = ctx.weight, ctx.needs_input_grad
        weight.check()
        if torch.is_grad_enabled():  # the gradients are to have gradients
            return *_differentiable(ctx, dy, x), None, None, None
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
        return dx, taken, dy.sum(0) if needs_bias and ctx.biased else None, None, None, None


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
