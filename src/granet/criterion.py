"""Criteria: functions from a layer to one score for each weight; higher scores are kept, or grown, first.

A criterion looks at each weight by itself, so it may be asked about any part of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One sparse parameter as a method sees it.

    Attributes:
        weight: the parameter's values.
        grad: the dense gradient of the loss, of the weight's shape, or None where no update needs it.
        effective: what the network computes with, or None where that is the weight itself.
    """

    weight: Tensor
    grad: Tensor | None = None
    effective: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.weight.shape

    def numel(self) -> int:
        """The number of weights, active or not."""
        return self.weight.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The weight's type."""
        return self.weight.dtype

    @property
    def has_grad(self) -> bool:
        """Whether the layer comes with its gradient."""
        return self.grad is not None

    def every(self, stride: int) -> Layer:
        """The first weight of each `stride`, in the order of the flat index."""
        flat = self.flat()
        return Layer(flat.weight[::stride], None if flat.grad is None else flat.grad[::stride])

    def flat(self) -> Layer:
        """The same layer with one dimension, in the order of the flat index."""
        return Layer(self.weight.reshape(-1), None if self.grad is None else self.grad.reshape(-1))

    def parts(self, size: int) -> Iterator[Layer]:
        """The flat layer in consecutive pieces of at most `size` weights."""
        flat = self.flat()
        grads = [None] * max(1, -(-self.numel() // size)) if flat.grad is None else flat.grad.split(size)
        for weight, grad in zip(flat.weight.split(size), grads, strict=True):
            yield Layer(weight, grad)


class NonFiniteScores(ValueError):  # noqa: N818  (it names what was found, as ArithmeticError does)
    """A score was NaN or infinite, so nothing was selected."""


Criterion = Callable[[Layer], Tensor]


def effective(layer: Layer) -> Tensor:
    """What the network computes with in place of the weight, signs and all: the weight itself for most methods."""
    return layer.weight if layer.effective is None else layer.effective


def own_values(layer: Layer) -> Tensor:
    """The layer's values themselves, for scores that were computed elsewhere: `Layer(scores)`."""
    return _float(layer.weight)


def magnitude(layer: Layer) -> Tensor:
    """The absolute weight |w|, in float32 at least."""
    return _float(layer.weight).abs()


magnitude.absolute = "weight"  # the score is the absolute value of this part of the layer: kernels read it directly


def gradient(layer: Layer) -> Tensor:
    """The absolute gradient |dL/dw|, in float32 at least (RigL, section 3; GraNet, Eq. 3).

    Raises:
        ValueError: the layer comes without its gradient.
    """
    if layer.grad is None:
        raise ValueError("this criterion needs the dense gradient, and the layer came without one")
    return _float(layer.grad).abs()


gradient.absolute = "grad"


def with_gradient(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Those of the layers that come with their gradient.

    Raises:
        ValueError: none does.
    """
    found = {name: layer for name, layer in layers.items() if layer.has_grad}
    if not found:
        raise ValueError("this update needs dense gradients, and no layer came with one")
    return found


def _float(values: Tensor) -> Tensor:
    """`values` detached, in float32 unless they are finer already: half-precision scores tie by the thousand."""
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()
