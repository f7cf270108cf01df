"""FLOPs of a network whose weights are partly inactive, for inference and for training.

A weight costs 2 FLOPs, a multiplication and an addition, each time it is used, and none while inactive. Normalisation,
activations, biases and products of activations (attention) are left out, as in the sparse-training literature.
Training a batch takes three times the forward pass: forward, gradient of the activations, gradient of the weights; the
last is dense in a step whose gradient decides where weights grow (Evci et al. 2020, "Rigging the Lottery", App. H).

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 10))
>>> flops = count(model, torch.ones(1, 1, 4, 4))
>>> flops.inference()  # 2 * (36 weights * 4 places + 160 weights)
608.0
>>> flops.inference({"2.weight": 16})
320.0
>>> flops.training_step({"2.weight": 16}), flops.training_step({"2.weight": 16}, dense_gradient=True)
(960.0, 1248.0)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from granet.functional import called_with
from granet.names import did_you_mean
from granet.sparsifier.reparameterize import bare

Active = Mapping[str, Tensor | int]  # parameter name -> its mask, or how many of its weights are active


@dataclass(frozen=True)
class Layer:
    """A parameter's share in the work of a forward pass."""

    name: str
    shape: tuple[int, ...]
    active: int
    dense_flops: int  # were all its weights active

    @property
    def total(self) -> int:
        """How many weights it has."""
        return prod(self.shape)

    @property
    def flops(self) -> float:
        """FLOPs with the weights that are active."""
        return self.dense_flops * self.active / self.total


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of a model over the inputs it was counted on."""

    shapes: Mapping[str, tuple[int, ...]]
    dense: Mapping[str, int]  # parameter name -> FLOPs with all weights active

    def per_layer(self, active: Active | None = None) -> tuple[Layer, ...]:
        """Return a row for every parameter that takes part in a product, in the model's order.

        Args:
            active: Masks or active counts; parameters that are not in it are dense.

        Raises:
            ValueError: A name is not a parameter, or a count or a mask does not fit its shape.
        """
        counts = {name: _active(name, given, self.shapes) for name, given in (active or {}).items()}
        return tuple(
            Layer(name, shape, counts.get(name, prod(shape)), self.dense[name])
            for name, shape in self.shapes.items()
            if self.dense[name]
        )

    def inference(self, active: Active | None = None) -> float:
        """Return the FLOPs f_S of a forward pass; without `active` those of the dense network, f_D."""
        return float(sum(layer.flops for layer in self.per_layer(active)))

    def training_step(
        self,
        active: Active | None = None,
        *,
        trained: Active | None = None,
        dense_gradient: bool = False,
        explored: float | None = None,
    ) -> float:
        """Return the FLOPs of a training step: 3 f_S, or 2 f_S + f_D if it needs the gradient of inactive weights.

        Args:
            active: Masks or active counts; parameters that are not in it are dense.
            trained: The weights whose gradient is needed, where they are not those that are active (Top-KAST).
            dense_gradient: Whether the gradient of every weight is needed.
            explored: With `dense_gradient`, for how many inactive weights for each active one; None for all of them.
        """
        f_s = self.inference(active)
        if dense_gradient and explored is not None:
            return 2 * f_s + min((1 + explored) * f_s, self.inference())
        return 2 * f_s + (self.inference() if dense_gradient else self.inference(trained) if trained else f_s)


def count(model: nn.Module, example_inputs: Tensor | tuple | Mapping[str, Any]) -> Flops:
    """Return the FLOPs of `model` on `example_inputs`; give a batch of one for FLOPs of an example.

    The model runs once, in evaluation mode, on the meta device, where tensors have shapes but no contents; a model that
    needs contents runs where it is (there torch fuses an LSTM to one operator, which is not counted). Each product
    counts for the parameter in it, whichever module multiplies: a module called twice counts twice, a tied weight under
    its first name. Count a model before `torch.compile` wraps it.

    Args:
        model: Anything whose products torch knows the FLOPs of; it is left as it was.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
    """
    args, kwargs = (), {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        try:
            return _count(model, args, kwargs, device="meta")
        except (RuntimeError, NotImplementedError):  # it looks at values, or uses an operator without shapes alone
            return _count(model, args, kwargs, device=None)
    finally:
        for module, training in modes.items():
            module.training = training


def _count(model: nn.Module, args: tuple, kwargs: dict, device: str | None) -> Flops:
    def moved(x):
        return x.to(device) if device and isinstance(x, Tensor) else x

    parameters = {name: moved(parameter.detach()) for name, parameter in model.named_parameters()}
    # buffers are copied, so that a forward pass which writes to them leaves the model's own alone
    buffers = {name: moved(buffer) if device else buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = tree_map(moved, (args, kwargs))
    mode = _Attribution(parameters)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole attention layer would hide its products
    try:
        with torch.inference_mode(False), torch.no_grad(), bare(model), mode:
            called_with(model, {**parameters, **buffers}, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Flops({name: tuple(p.shape) for name, p in model.named_parameters()}, mode.flops)


class _Attribution(TorchDispatchMode):
    """Adds the FLOPs of every product to the parameter whose memory, or a copy of it, is in it."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.flops = dict.fromkeys(parameters, 0)
        self.owners: dict[int, str] = {}
        self.alive = []  # an address belongs to one storage as long as that lives
        for name, parameter in parameters.items():
            self._own(parameter, name)

    def _own(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        self.alive.append(storage)
        self.owners[storage._cdata] = name

    def _owner(self, tensor: Tensor) -> str | None:
        return self.owners.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            # the weight is the last matrix: addmm(bias, x, weight), convolution(x, weight, bias)
            owners = [self._owner(tensor) for tensor in tensors if tensor.ndim > 1]
            owner = next((owner for owner in reversed(owners) if owner), None)
            if owner:
                self.flops[owner] += formula(*args, **kwargs, out_val=out)
        elif len(tensors) == 1 and isinstance(out, Tensor) and out.numel() == tensors[0].numel():
            owner = self._owner(tensors[0])
            if owner:  # cast, cloned or laid out anew, it is the same weight
                self._own(out, owner)
        return out


def _active(name: str, given: Tensor | int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if name not in shapes:
        raise ValueError(f"the model has no parameter {name!r}{did_you_mean(name, shapes)}")
    if isinstance(given, Tensor) and given.ndim and tuple(given.shape) != shapes[name]:
        raise ValueError(f"the mask of {name} has shape {tuple(given.shape)}, its weight {shapes[name]}")
    active = int(given.sum()) if isinstance(given, Tensor) else given
    if not 0 <= active <= prod(shapes[name]):
        raise ValueError(f"{name} has {prod(shapes[name])} weights, so not {active} active ones")
    return active
