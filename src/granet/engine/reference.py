"""The engine's operators in plain torch: what the kernels must compute, and what runs where they cannot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from granet.engine.spec import Spec


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, spec: Spec) -> Tensor:
    """Returns the layer's output with inactive weights taken as zero.

    The input is NCHW, or (rows, features) for a linear layer.
    """
    weight = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype)).view(spec.weight_shape)
    image = x if x.dim() == 4 else x[:, :, None, None]
    y = F.conv2d(image, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    return y if x.dim() == 4 else y.flatten(1)


def conv_gradients(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the input and of the weight, which is zero at inactive positions."""
    active = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    return input_gradient(dy, x, active, spec), weight_gradient(dy, x, weight, spec) * mask


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    """Returns the gradient of the input, computed by operators that can be differentiated again."""
    if x.dim() == 2:
        return dy @ weight.view(spec.out_channels, spec.in_channels)
    kernel = weight.view(spec.weight_shape)
    return torch.nn.grad.conv2d_input(x.shape, kernel, dy, spec.stride, spec.padding, spec.dilation, spec.groups)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    """Returns the gradient of all weights, active or not, computed by operators that can be differentiated again."""
    if x.dim() == 2:
        return (dy.t() @ x).view(weight.shape)
    shape = spec.weight_shape
    dw = torch.nn.grad.conv2d_weight(x, shape, dy, spec.stride, spec.padding, spec.dilation, spec.groups)
    return dw.view(weight.shape)
