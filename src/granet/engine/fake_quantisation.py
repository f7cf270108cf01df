"""Quantisation-aware training: layers compute with the rounded weights and inputs of the int8 engine.

Parameters stay the float32 tensors they are, under their names; only the modules' `forward` is exchanged, and given
back by `remove()`. Gradients pass the rounding unchanged, but for those of inputs outside their range, which are zero
(Jacob et al., CVPR 2018, section 3). The rounding is torch's own `fake_quantize_per_channel_affine` and
`fake_quantize_per_tensor_affine`.

Batch norm needs no folding here. Folded into a layer it multiplies each output channel of the weight by one number, and
as each output channel has a scale of its own, that multiplies the rounded weight by the same number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.engine.layer import is_exchanged
from granet.engine.precision import weight_scale
from granet.engine.quantise import best_range, sampled, scale_and_zero
from granet.names import described, unknown

log = logging.getLogger(__name__)

MOMENTUM = 0.01  # weight of the newest batch in the moving average of an input's range
KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class FakeQuantisation:
    """The layers of a model that round their weights and inputs. See `fake_quantise`.

    Args:
        model: the model.
        precision: "int8", or None for no rounding at all.

    Attributes:
        names: the modules whose weights and inputs are rounded.
        ranges: the lowest and highest number of each one's input, of shape (modules, 2); NaN where nothing was seen.
    """

    def __init__(self, model: nn.Module, precision: str | None):
        layers = {} if precision is None else _layers(model)
        self.names = tuple(layers)
        device = next((layer.weight.device for layer in layers.values()), None)
        self.ranges = torch.full((len(layers), 2), torch.nan, device=device)
        self._exchanged: list[_Forward] = []
        self._install(layers)

    def _install(self, layers: Mapping[str, nn.Module]) -> None:
        for i, module in enumerate(layers.values()):
            self._exchanged.append(_Forward(module, self.ranges, i))
            module.forward = self._exchanged[-1]

    def follow(self, copy: nn.Module) -> None:
        """Has a copy of the model, such as a moving average of its weights, round as the model does, in these ranges.

        Ranges are learned from what goes through a module in training mode, so keep the copy in evaluation mode.
        """
        self._install({name: copy.get_submodule(name) for name in self.names})

    def remove(self) -> None:
        """Gives every module its own forward back; the ranges stay as they are."""
        for forward in self._exchanged:
            if forward.module.__dict__.get("forward") is forward:
                del forward.module.forward
        self._exchanged = []

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the range of each layer's input, by the layer's name."""
        return {name: ends.clone() for name, ends in zip(self.names, self.ranges, strict=True)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Puts ranges back that `state_dict` gave.

        Raises:
            ValueError: they are those of other layers.
        """
        if set(state_dict) != set(self.names):
            theirs, mine = (", ".join(names) or "no layer" for names in (state_dict, self.names))
            raise ValueError(f"the ranges are those of {theirs}, and this model rounds {mine}")
        for name, ends in zip(self.names, self.ranges, strict=True):
            ends.copy_(state_dict[name].view(2))


class _Forward:
    """The exchanged `forward` of a module, and the place of its input's range."""

    def __init__(self, module: nn.Module, ranges: Tensor, place: int):
        self.module, self._ranges, self._place = module, ranges, place

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's output; the argument has the name that it has in torch's own layers."""
        module, x, weight = self.module, self._rounded(input), _rounded_weight(self.module.weight)
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, module.bias)
        return module._conv_forward(x, weight, module.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        kept = self._ranges[self._place]
        learning = self.module.training and torch.is_grad_enabled()
        if learning or kept.isnan().any():  # in training this is not asked, because a GPU would have to be waited for
            new = best_range(sampled(x.detach())).to(kept)
            kept.copy_(torch.where(kept.isnan(), new, kept.lerp(new, MOMENTUM)))
        scale, zero = scale_and_zero(kept.to(x.device))
        rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, 255)
        # NaN and infinity would become numbers; a range that was learned with them is itself NaN
        return rounded if learning else rounded + (x - x).detach()


def _rounded_weight(weight: Tensor) -> Tensor:
    """Returns a weight as the int8 engine rounds it: a scale for each output channel. Zeros stay zeros."""
    scale = weight_scale(weight.detach())
    return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale).int(), 0, -127, 127)


def _is_plain(module: nn.Module) -> bool:
    """Returns whether a layer computes as torch's layer of its kind does, though its class may be another one."""
    kind = next(kind for kind in KINDS if isinstance(module, kind))
    return all(getattr(type(module), key, None) is getattr(kind, key, None) for key in ("forward", "_conv_forward"))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that the int8 engine computes, by name.

    Raises:
        ValueError: there is none, or one whose forward was exchanged, or that does not compute in float32.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    own = [name for name, module in layers.items() if not _is_plain(module)]
    if own:
        log.warning("not rounded, because they compute in a way of their own: %s", ", ".join(own))
    layers = {name: module for name, module in layers.items() if name not in own}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer whose numbers could be rounded")
    for name, module in layers.items():
        if is_exchanged(module):
            raise ValueError(f"the forward of {name!r} was exchanged already: call remove() of what exchanged it first")
        if module.weight.dtype != torch.float32:
            kind = str(module.weight.dtype).removeprefix("torch.")
            raise ValueError(f"{name!r} computes in {kind}: weights are rounded from float32; call model.float() first")
    return layers


def fake_quantise(model: nn.Module, precision: str = "int8") -> FakeQuantisation:
    """Returns the handle of a model that from now on computes with weights and inputs rounded as in the int8 engine.

    Train the model on with it (quantisation-aware fine-tuning), call `remove()`, and compile it by
    `granet.compile(model, ..., precision="int8", calibration=...)`. Weights get one scale for each output channel, and
    inactive ones stay exactly zero. The input of each layer has one range, the one with the least mean squared error on
    a batch, averaged over batches in training mode; in evaluation mode it stays as it is. Parameters, their names, the
    state dict and the masks of a sparsifier are left alone, and everything else computes in float32: biases, batch
    norm, sums. Where a residual sum reads a value that no layer reads, the engine rounds that value as well.

    Args:
        model: the model, in float32. Its `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` layers are rounded.
        precision: "int8".

    Raises:
        TypeError: the model is no `torch.nn.Module`.
        ValueError: the precision is unknown, or the model has no such layer or one that cannot be rounded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is {described(model)}, and a torch.nn.Module is needed")
    if precision != "int8":
        raise ValueError(unknown("precision of quantisation-aware training", precision, ("int8",)))
    return FakeQuantisation(model, precision)
