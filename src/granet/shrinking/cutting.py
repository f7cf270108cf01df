"""Which units may go, and the layers without them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from granet.shrinking.walk import CONVOLUTIONS, Call, Found


def removable(found: Found) -> Tensor:
    """Returns for each channel whether it can be removed with its whole unit and the outputs stay what they are.

    It can where every layer that reads it either has no weight there, or reads a constant that its bias or another
    channel can take over. A layer that loses outputs has fewer weights, so that more inputs can go; one channel of each
    layer stays.
    """
    roots, kept = found.units.roots(), found.units.pinned()
    gone = torch.zeros(len(roots), dtype=torch.bool)  # by unit
    plain = [call for call in found.calls if call.groups == 1]
    active_weights = {call.module: (_by_pair(call.module.weight) != 0).any(2) for call in plain}
    for call in plain:
        kept[roots[call.inputs.ids[carrier(call)]]] = True
    while True:
        blocked = kept.clone()
        for call in plain:
            active = active_weights[call.module] & ~gone[roots[call.outputs]][:, None]
            blocked[roots[call.inputs.ids[active.any(0) & call.inputs.varying]]] = True
        candidates = ~blocked
        for ids in (ids for call in found.calls for ids in (call.inputs.ids, call.outputs)):
            left = roots[ids][~gone[roots[ids]]]
            if candidates[left].all():
                candidates[left[0]] = False
        if torch.equal(candidates | gone, gone):
            return gone[roots]
        gone |= candidates


def carrier(call: Call) -> Tensor:
    """Returns the place of the input that takes over other constants; empty if the bias can, or if there are none.

    In front of a convolution with padding a constant ends where the padding begins, so that no bias replaces it.
    Another constant does, times the quotient of the two; the largest is taken.
    """
    active = (_by_pair(call.module.weight) != 0).any(2).any(0)
    values = (call.inputs.values * active).nan_to_num(0).abs()
    return values.argmax()[None] if call.padded and values.any() else torch.empty(0, dtype=torch.int64)


def cut(found: Found, gone: Tensor) -> None:
    """Removes channels from the layers and batch norms of a model, in place, and adds what they held to biases."""
    for call in {call.module: call for call in found.calls}.values():
        if gone[call.inputs.ids].any() or gone[call.outputs].any():
            _cut_layer(call, ~gone[call.inputs.ids], ~gone[call.outputs])
    for module, ids in dict(found.norms).items():
        if gone[ids].any():
            _cut_norm(module, ~gone[ids])


def _cut_layer(call: Call, inputs: Tensor, outputs: Tensor) -> None:
    module: nn.Module = call.module
    weight, bias = module.weight.detach(), module.bias
    if call.groups == 1:
        constants = call.inputs.values.masked_fill(call.inputs.varying | inputs, 0)
        folded = torch.einsum("oik,i->ok", _by_pair(weight).double(), constants)
        place = carrier(call)
        if len(place) and folded.any():
            moved = (folded / call.inputs.values[place]).reshape(weight[:, place].shape)
            weight = weight.index_copy(1, place, (weight[:, place].double() + moved).to(weight.dtype))
        elif folded.any():
            before = torch.zeros(len(folded)) if bias is None else bias.detach()
            bias = (before.double() + folded.sum(1)).to(weight.dtype)
        weight = weight[:, inputs]
    module.weight = _parameter(weight[outputs], module.weight)
    if bias is not None:
        module.bias = _parameter(bias.detach()[outputs], module.weight if module.bias is None else module.bias)
    if isinstance(module, CONVOLUTIONS):
        if call.groups > 1:
            module.groups = int(inputs.sum()) // (module.in_channels // call.groups)
        module.in_channels, module.out_channels = int(inputs.sum()), int(outputs.sum())
    else:
        module.in_features, module.out_features = int(inputs.sum()), int(outputs.sum())


def _cut_norm(module: nn.Module, kept: Tensor) -> None:
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            setattr(module, name, _parameter(getattr(module, name).detach()[kept], getattr(module, name)))
    module.running_mean, module.running_var = module.running_mean[kept], module.running_var[kept]
    module.num_features = int(kept.sum())


def _by_pair(weight: Tensor) -> Tensor:
    """Returns a weight with the places of its kernel on one axis behind outputs and inputs."""
    return weight.detach().reshape(*weight.shape[:2], -1)


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=like.requires_grad)
