"""The plain torch meaning of the engine's operators: what the kernels must equal, and what runs where they cannot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granet.engine.spec import Spec


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, spec: Spec) -> Tensor:
    """The layer's output with the inactive weights taken as zero; x is NCHW, or (rows, features) for a linear layer."""
    weight = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype)).view(spec.weight_shape)
    image = x if x.dim() == 4 else x[:, :, None, None]
    y = F.conv2d(image, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    return y if x.dim() == 4 else y.flatten(1)


def conv_gradients(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the weight at active positions (zero elsewhere)."""
    image, gradient = (t if t.dim() == 4 else t[:, :, None, None] for t in (x, dy))
    kernel = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype)).view(spec.weight_shape)
    dx = torch.nn.grad.conv2d_input(
        image.shape, kernel, gradient, spec.stride, spec.padding, spec.dilation, spec.groups
    )
    return dx.view(x.shape), weight_gradient(dy, x, weight, spec) * mask


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    """The gradient of every weight, active or not."""
    if x.dim() == 2:
        return (dy.t() @ x).view(weight.shape)
    shape = spec.weight_shape
    dw = torch.nn.grad.conv2d_weight(x, shape, dy, spec.stride, spec.padding, spec.dilation, spec.groups)
    return dw.view(weight.shape)
