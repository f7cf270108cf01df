"""The operators of torch that a saved model may call: pure functions of tensors that check what they are given.

None of them reads or writes a file, shares memory in a way that its arguments do not show, draws random numbers, or
runs code that it is passed. Some do not check all of their arguments themselves; they are checked here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from granet.engine.runtime import alone

aten = torch.ops.aten

_ATEN = """
_adaptive_avg_pool2d.default _log_softmax.default _softmax.default _to_copy.default _unsafe_view.default
abs.default add.Scalar add.Tensor addmm.default alias.default amax.default amin.default argmax.default
arange.default arange.start avg_pool2d.default baddbmm.default bmm.default cat.default clamp.default clamp_max.default
clamp_min.default clone.default constant_pad_nd.default convolution.default cos.default cumsum.default detach.default
div.Scalar div.Tensor elu.default embedding.default eq.Scalar eq.Tensor erf.default exp.default expand.default
flip.default full.default full_like.default ge.Scalar ge.Tensor gelu.default gt.Scalar gt.Tensor
hardsigmoid.default hardswish.default hardtanh.default index_select.default le.Scalar le.Tensor leaky_relu.default
log.default logical_and.default logical_not.default lt.Scalar lt.Tensor masked_fill.Scalar
max_pool2d_with_indices.default maximum.default mean.default mean.dim minimum.default mish.default mm.default
mul.Scalar mul.Tensor native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default
permute.default pixel_shuffle.default pow.Tensor_Scalar reciprocal.default relu.default repeat.default roll.default
rsqrt.default rsub.Scalar scalar_tensor.default select.int sigmoid.default silu.default sin.default slice.Tensor
softplus.default split.Tensor split_with_sizes.default sqrt.default squeeze.dim squeeze.dims stack.default sub.Scalar
sub.Tensor sum.default sum.dim_IntList t.default tanh.default transpose.int unbind.int unsqueeze.default
upsample_bilinear2d.vec upsample_nearest2d.vec var.correction view.default where.self
"""


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float):
    if x.dim() < 2 or any(t is not None and t.shape != x.shape[1:2] for t in (weight, bias, mean, var)):
        raise ValueError(f"batch norm: statistics do not fit an input of shape {tuple(x.shape)}")
    return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
):
    fits = q.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3:] == k.shape[3:]
    if not fits or dropout_p != 0:
        raise ValueError(f"attention: {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} do not fit each other")
    if attn_mask is not None:
        attn_mask.expand(*q.shape[:3], k.shape[2])  # raises an error if it does not fit
    call = aten._scaled_dot_product_flash_attention_for_cpu.default
    return call(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)


def _nearest(x: Tensor, size: list[int], *scales: float | None):
    _check_scales(x, size, scales)
    return aten.upsample_nearest2d.default(x, size, *scales)


def _bilinear(x: Tensor, size: list[int], align_corners: bool, *scales: float | None):
    _check_scales(x, size, scales)
    return aten.upsample_bilinear2d.default(x, size, align_corners, *scales)


def _check_scales(x: Tensor, size: list[int], scales: tuple[float | None, ...]) -> None:
    for before, after, scale in zip(x.shape[2:], size, scales, strict=False):
        if scale is not None and not 0 <= before * scale - after < 1:  # NaN is refused, too
            raise ValueError(f"upsampling from {before} to {after} does not fit a scale of {scale}")


def _named(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload)


_CHECKED: dict[object, Callable[..., object]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten.upsample_nearest2d.default: _nearest,
    aten.upsample_bilinear2d.default: _bilinear,
}
_NAMES: dict[object, str] = {_named(name): name for name in _ATEN.split()}
_NAMES |= {op: str(op).removeprefix("aten.") for op in _CHECKED} | {operator.getitem: "item", alone: "alone"}
OPERATORS: dict[str, Callable[..., object]] = {name: _CHECKED.get(op, op) for op, name in _NAMES.items()}


def name_of(target: object) -> str:
    """Returns the name of an operator. Raises a ValueError if a file cannot hold a call of it."""
    if target not in _NAMES:
        raise ValueError(f"it calls {target}, which is none of the operators that a file can hold")
    return _NAMES[target]
