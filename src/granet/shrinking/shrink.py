"""`granet.shrink`: the same network without its dead channels."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from granet import flops
from granet.functional import copied
from granet.names import described
from granet.shrinking.cutting import cut, removable
from granet.shrinking.walk import walk
from granet.sparsifier.reparameterize import fold
from granet.text import columns, si

BOUND = 1e-4  # the largest deviation of outputs, as a share of the largest


@dataclass(frozen=True)
class Cut:
    """A layer before and after.

    Attributes:
        name: of its weight.
        before: the shape of the weight, and
        after: the shape it has now.
        multiply_adds: multiplications (each with an addition) for one example, before and after, zeros included.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    multiply_adds: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A network without its dead channels, and what went. `str()` gives a table of its layers.

    Attributes:
        model: the smaller network.
        layers: its layers that multiply.
        parameters: the number of all parameters before and after, zeros included.
        deviation: the largest difference of outputs on the example, as a share of the largest output.
    """

    model: nn.Module
    layers: tuple[Cut, ...]
    parameters: tuple[int, int]
    deviation: float

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Those of all layers for one example, before and after."""
        before, after = zip(*(layer.multiply_adds for layer in self.layers), strict=True) if self.layers else ((), ())
        return sum(before), sum(after)

    def __str__(self) -> str:
        rows = [["layer", "weight before", "after", "multiply-adds before", "after", "left"]]
        for layer in self.layers:
            shapes = ["x".join(map(str, shape)) for shape in (layer.before, layer.after)]
            rows.append([layer.name, *shapes, *_numbers(layer.multiply_adds)])
        parameters = _numbers(self.parameters)
        rows.append(["all layers", "", "", *_numbers(self.multiply_adds)])
        table = columns(rows, right=[3, 4, 5])
        last = f"parameters: {parameters[0]} before, {parameters[1]} after ({parameters[2]} left)"
        return f"{table}\n{last}; outputs deviate by {self.deviation:.2g} of the largest"


def _numbers(pair: tuple[int, int]) -> list[str]:
    return [si(pair[0]), si(pair[1]), f"{pair[1] / max(1, pair[0]):.1%}"]


def shrink(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Shrunk:
    """Returns a copy of the model without its dead channels, which computes the same in evaluation mode.

    A channel is cut out of the layer that makes it, of its batch norm and of all layers that read it, if these have no
    weight for it, or if what it holds does not depend on the input. The bias of a batch norm behind a filter without
    weights is such a constant. It goes into the biases of the layers that read it; in front of a convolution with
    padding, where the constant ends at the border, one such channel stays for all. Channels that an addition joins go
    together, groups go as a whole, and one channel of each layer stays. What enters an operator that is not known
    (layer norm, attention, a view of fixed width) is kept.

    The outputs on the example, and on random numbers in its place, are compared with those of the model.

    Args:
        model: a model that `torch.fx` can trace; it is left as it is. Remove the reparametrizations of
            `torch.nn.utils.prune` and a plan of `granet.accelerate` first.
        example: a tensor, or a tuple of the positional arguments.

    Raises:
        ValueError: torch.fx cannot trace the model, or the example does not fit.
        ArithmeticError: the outputs are not the same, which is a defect of this function.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(one, Tensor) and one.dim() for one in inputs):
        raise ValueError(f"the example is {described(example)}: give a tensor or a tuple of tensors with a batch")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = tuple(one.detach().cpu() for one in inputs)
    small = copied(model).cpu()
    fold(small)
    modes = [module.training for module in small.modules()]
    small.eval()
    before = copy.deepcopy(small)
    found = walk(small, inputs)
    cut(found, removable(found))
    deviation = max(_deviation(before, small, inputs), _deviation(before, small, tuple(map(_random, inputs))))
    if not deviation <= BOUND:
        raise ArithmeticError(
            f"the smaller model's outputs deviate by {deviation:.2g} of the largest: please report it"
        )
    layers = _layers(before, small, inputs)
    parameters = tuple(sum(one.numel() for one in network.parameters()) for network in (before, small))
    for module, training in zip(small.modules(), modes, strict=True):
        module.training = training
    return Shrunk(small.to(device), layers, parameters, deviation)


def _layers(before: nn.Module, after: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Cut, ...]:
    first, second = ({row.name: row for row in flops.count(net, inputs).per_layer()} for net in (before, after))
    both = 2 * len(inputs[0])  # a multiplication and an addition for each example
    return tuple(
        Cut(name, row.shape, second[name].shape, (row.dense_flops // both, second[name].dense_flops // both))
        for name, row in first.items()
    )


def _deviation(before: nn.Module, after: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        expected, found = (
            [one for one in tree_leaves(net(*inputs)) if isinstance(one, Tensor)] for net in (before, after)
        )
    if [one.shape for one in expected] != [one.shape for one in found]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    largest = max((a.abs().max().item() for a, _ in pairs), default=0.0)
    return max(((a - b).abs().max().item() for a, b in pairs), default=0.0) / (largest or 1.0)


def _random(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype)
