"""The steps of compiled inference, over values: activations that stay in planes from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from granet.engine.precision import FLOAT32, Format
from granet.engine.spec import Spec


@dataclass(eq=False)
class Value:
    """Activations inside a segment: `images` of `channels` x `size`. `shape` is the shape of the tensor they form."""

    images: int
    channels: int
    size: tuple[int, int]
    shape: tuple[int, ...]
    format: Format = FLOAT32

    @property
    def planes(self) -> int:
        """Returns the number of planes that hold the channels."""
        return -(-self.channels // self.format.channels)


@dataclass(eq=False)
class Step:
    """One operation of a segment. `out` is its result."""

    out: Value
    inputs: list[Value]


@dataclass(eq=False)
class Input(Step):
    """A tensor that enters the segment. `key` identifies it for the caller, who passes the tensor."""

    key: object = None


@dataclass(eq=False)
class Convolution(Step):
    """A convolution or linear layer with the operations fused into it. Inputs are the data and maybe a residual."""

    name: str = ""
    spec: Spec | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    activation: str = ""

    @property
    def density(self) -> float:
        """Returns the share of weights that are not zero."""
        return self.weight.count_nonzero().item() / max(1, self.weight.numel())


@dataclass(eq=False)
class MaxPool(Step):
    """A maximum over windows."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class AvgPool(Step):
    """The mean over all positions."""


@dataclass(eq=False)
class Add(Step):
    """The sum of one or two values, then an activation."""

    activation: str = ""


@dataclass(eq=False)
class Convert(Step):
    """The same numbers in another format."""


@dataclass(eq=False)
class Segment:
    """Steps that run in one native call. `outputs` are the values that the call returns."""

    images: int
    steps: list[Step] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def layers(self) -> list[Convolution]:
        """Returns the segment's convolution and linear layers."""
        return [s for s in self.steps if isinstance(s, Convolution)]
