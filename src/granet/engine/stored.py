"""Convolutions in sparse storage on the sparse kernels, which find each value by its rank among the active weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from granet.engine import ops, reference
from granet.engine.spec import Spec


def layout(
    mask: Tensor, positions: Tensor, spec: Spec, shape: tuple[int, ...], batch: int | None, bfloat16: bool
) -> ops.Layout:
    """Returns the layout of a layer whose weight is values at the flat `positions` of the mask; see `ops.layout`."""
    place = ops.layout(mask, spec, shape, batch, bfloat16=bfloat16)
    forward, backward = (
        replace(one, index=torch.searchsorted(positions, one.index, out_int32=True))
        for one in (place.forward, place.backward)
    )
    return replace(place, forward=forward, backward=backward)


def conv(x: Tensor, module: nn.Module, place: ops.Layout) -> Tensor:
    """Returns the output of a layer in sparse storage, differentiable in the input, the values and the bias.

    Args:
        x: the input (NCHW).
        module: the layer.
        place: its topology on an input of this shape, from `layout`.
    """
    return _Conv.apply(x, module.values, module.bias, module.positions, place)


class _Conv(torch.autograd.Function):
    """The operator `ops.conv`, with gradients that are as few as the values."""

    @staticmethod
    def forward(ctx, x, values, bias, positions, place):
        ctx.save_for_backward(x, values)
        ctx.positions, ctx.place, ctx.biased = positions, place, bias is not None
        return ops.conv(x, values, bias, place)

    @staticmethod
    def backward(ctx, dy):
        x, values = ctx.saved_tensors
        place, (need_x, need_values, need_bias, *_) = ctx.place, ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients are to have gradients
            dx, dv = _differentiable(ctx, dy, x, values, need_x, need_values)
        else:
            how = {"bfloat16": place.geometry.bfloat16}
            needs = (need_x, need_values)
            dx, found = ops.active_gradients(dy, x, values, place.structure, place.numbers, *needs, **how)
            dx, dv = dx if need_x else None, torch.zeros_like(values) if need_values else None
            if need_values:
                torch.ops.granet.place_values(dv, found, place.forward.index)
        db = dy.sum((0, 2, 3), dtype=torch.float32) if ctx.biased and need_bias else None
        return dx, dv, db, None, None


def _differentiable(ctx, dy: Tensor, x: Tensor, values: Tensor, need_x: bool, need_values: bool):
    """The gradients by operations that autograd can follow, with a dense weight for a while."""
    spec, at = ctx.place.spec, ctx.positions.long()
    flat = values.new_zeros(torch.Size(spec.weight_shape).numel())
    weight = flat.index_copy(0, at, values[: len(at)]).to(x.dtype).view(spec.weight_shape)
    dx = reference.input_gradient(dy, x, weight, spec) if need_x else None
    if not need_values:
        return dx, None
    dv = reference.weight_gradient(dy, x, weight, spec).reshape(-1)[at].to(values.dtype)
    return dx, torch.nn.functional.pad(dv, (0, len(values) - len(at)))
