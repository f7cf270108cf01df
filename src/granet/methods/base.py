"""What a method is: a frozen value with the paper's hyper-parameters, asked at given moments for masks.

A method keeps no state and touches no tensor that it is given: `init` and `update` return new masks, the `Sparsifier`
applies them. Steps are optimizer steps, counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from granet import distribution, topology

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from granet.criterion import Layer

Steps = Annotated[int, "steps"]
"""A number of optimizer steps; recipes may also write it as epochs, `80ep`, or as a share of training, `50%`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose which weights are active, from its paper.

    Class attributes say what a method needs, so that nobody has to ask for its name:

    - `needs_dense_grad`: its updates look at the gradient of inactive weights too.
    - `replaces_step`: the optimizer does not step where the topology is updated.
    - `needs_probe`: its `init` looks at gradients on a few batches, `init(layers, rng, probe)`.
    - `remembers`: its `update` is given a dict of tensors that lasts from one to the next, `update(..., memory)`.
    - `drifts`: it moves active weights itself after the optimizer's step; see `drift`.
    - `reparameterizes`: it trains other parameters than the weights.
    """

    needs_dense_grad: ClassVar[bool] = False
    replaces_step: ClassVar[bool] = False
    needs_probe: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    drifts: ClassVar[bool] = False
    reparameterizes: ClassVar[bool] = False

    def initial_counts(self, shapes: distribution.Shapes) -> dict[str, int]:
        """The number of active weights of each layer before training."""
        return distribution.uniform(shapes, 1.0)

    def final_counts(self, shapes: distribution.Shapes) -> dict[str, int] | int:
        """The number of active weights of each layer after training, or in total where the layers compete for them."""
        return self.initial_counts(shapes)

    def init(self, layers: Mapping[str, Layer], rng: torch.Generator) -> dict[str, Tensor]:
        """The masks to start from: `initial_counts` at random places."""
        shapes = topology.shapes_of(layers)
        return topology.random_masks(self.initial_counts(shapes), shapes, rng)

    def gradient_mix(self, step: int) -> tuple[float, float] | None:
        """How the dense gradient of `step` is taken in: `kept = keep * kept + add * grad`, as `(keep, add)`.

        None where nobody looks at it. What is kept when an update comes is the layers' `grad` there.
        """
        return (0.0, 1.0) if self.needs_dense_grad and self.is_update(step) else None

    def drift(
        self,
        step: int,
        layers: Mapping[str, Layer],
        masks: Mapping[str, Tensor],
        rng: torch.Generator,
        lr: Mapping[str, float],
        memory: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """What is added to the active weights after optimizer step `step`, for methods that say `drifts`."""
        return {}

    def is_update(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step`."""
        return False

    def update(
        self, step: int, layers: Mapping[str, Layer], masks: Mapping[str, Tensor], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """The masks after optimizer step `step`, from the weights after it and the dense gradients of it."""
        return dict(masks)

    def sparsity_at(self, step: int) -> float:
        """The sparsity that the schedule asks for at `step`; a network has it from the last update up to then."""
        return 0.0

    def regeneration_at(self, step: int) -> float:
        """The share of its active weights that a layer exchanges in an update at `step`."""
        return 0.0


def require(
    method: Method, *, sparsity: tuple[str, ...] = (), share: tuple[str, ...] = (), steps: tuple[str, ...] = ()
):
    """Refuse hyper-parameters that mean nothing.

    Args:
        method: the method that is being constructed.
        sparsity: names of fields that must lie in [0, 1).
        share: names of fields that must lie in [0, 1].
        steps: names of fields that must be positive whole numbers.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    kind = type(method).__name__
    for name in sparsity:
        if not 0 <= getattr(method, name) < 1:
            raise ValueError(
                f"{kind}: {name}={getattr(method, name)} is outside [0, 1): it is the share of inactive weights"
            )
    for name in share:
        if not 0 <= getattr(method, name) <= 1:
            raise ValueError(f"{kind}: {name}={getattr(method, name)} is outside [0, 1]")
    for name in steps:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{kind}: {name}={value!r} is not a positive number of steps")


def require_order(method: Method, *names: str) -> None:
    """Refuse steps that do not follow one another: `begin <= end <= total`, say."""
    values = [getattr(method, name) for name in names]
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in values) or values != sorted(
        values
    ):
        given = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise ValueError(f"{type(method).__name__}: {given}: whole steps with 0 <= {' <= '.join(names)} are needed")


def require_scope(method: Method) -> None:
    """Refuse a `scope` that is neither of the two there are."""
    if method.scope not in ("global", "layerwise"):
        raise ValueError(f"{type(method).__name__}: scope={method.scope!r}: choose 'global' or 'layerwise'")
