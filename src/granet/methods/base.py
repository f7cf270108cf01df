"""What a method is: a frozen value with the paper's hyper-parameters, asked at given moments for masks.

A method keeps no state and touches no tensor that it is given: `init` and `update` return new masks, the `Sparsifier`
applies them. Steps are optimizer steps, counted from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, Annotated, ClassVar, get_args, get_type_hints

from granet import criterion, distribution, topology
from granet.names import described, unknown
from granet.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from granet.criterion import Layer

Steps = Annotated[int, "steps"]
"""A number of optimizer steps; recipes may also write it as epochs, `80ep`, or as a share of training, `50%`."""


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_NEEDED: dict[type, tuple[str, Callable[[object], bool]]] = {  # by annotation: what is needed, and whether it is given
    float: ("a number", _is_number),
    int: ("a number", _is_number),  # whether it is whole is looked at with its value
    str: ("a text", lambda value: isinstance(value, str)),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    NoneType: ("None", lambda value: value is None),
}


@cache
def _types(kind: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a method may have; none of a field whose annotation cannot be read."""
    try:
        hints = get_type_hints(kind)
    except NameError:
        return {}
    names = getattr(kind, "__dataclass_fields__", {})
    return {
        name: get_args(hint) or (hint,) for name, hint in hints.items() if name in names and "ClassVar" not in str(hint)
    }


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose which weights are active, from its paper.

    Class attributes say what a method needs, so that nobody has to ask for its name:

    - `needs_dense_grad`: its updates look at the gradient of inactive weights too; hyper-parameters may decide it.
    - `needs_grad`: they look at the gradient of active weights at least.
    - `replaces_step`: the optimizer does not step where the topology is updated.
    - `needs_probe`: its `init` looks at gradients on a few batches, `init(layers, rng, probe)`.
    - `remembers`: its `update` is given a dict of tensors that lasts from one to the next, `update(..., memory)`.
    - `drifts`: it moves active weights itself after the optimizer's step; see `drift`.
    - `reparameterizes`: the network computes with effective weights, made of those that are trained; see `effective`.
    - `decays`: it penalises the weights itself (`penalty`), so that an optimizer should not decay the sparse ones too.
    """

    needs_dense_grad: ClassVar[bool] = False
    replaces_step: ClassVar[bool] = False
    needs_probe: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    drifts: ClassVar[bool] = False
    reparameterizes: ClassVar[bool] = False
    decays: ClassVar[bool] = False

    def __new__(cls, *given, **fields):
        """Refuse settings of the wrong type, by the annotations of the fields, before their values are looked at."""
        kind = cls.__name__
        if given:
            names = ", ".join(list(_types(cls))[:2])
            raise TypeError(f"{kind} takes its settings by name ({names}, ...), and {described(given[0])} has none")
        for name, value in fields.items():
            allowed = _types(cls).get(name, ())
            right = [_NEEDED[one][1](value) for one in allowed if one in _NEEDED]
            if right and not any(right):
                needed = " or ".join(_NEEDED[one][0] for one in allowed if one in _NEEDED)
                raise TypeError(f"{kind}: {name} is {described(value)}, and {needed} is needed")
        return super().__new__(cls)

    def initial_counts(self, shapes: distribution.Shapes) -> dict[str, int] | int | None:
        """The number of active weights of each layer before training.

        One number in total where the layers compete for them, None where the network decides it.
        """
        return distribution.uniform(shapes, 1.0)

    def final_counts(self, shapes: distribution.Shapes) -> dict[str, int] | int | None:
        """The same after training."""
        return self.initial_counts(shapes)

    def init(self, layers: Mapping[str, Layer], rng: torch.Generator) -> dict[str, Tensor]:
        """The masks to start from: `initial_counts` at random places."""
        shapes = topology.shapes_of(layers)
        return topology.random_masks(self.initial_counts(shapes), shapes, rng)

    def gradient_mix(self, step: int) -> tuple[float, float] | None:
        """How the dense gradient of `step` is taken in: `kept = keep * kept + add * grad`, as `(keep, add)`.

        None where nobody looks at it. What is kept when an update comes is the layers' `grad` there.
        """
        return (0.0, 1.0) if self.needs_grad and self.is_update(step) else None

    @property
    def needs_grad(self) -> bool:
        return self.needs_dense_grad

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

    def companions(self, layers: Mapping[str, Layer], masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What each effective weight is made of beside the weight, for methods that say `reparameterizes`.

        A floating-point tensor is learned from there on. A bool tensor is a set of places of the weight's shape, asked
        for anew with new masks; `trained` is by its name the set that gradients reach.
        """
        return {}

    def effective(self, weight: Tensor, **companions: Tensor) -> Tensor:
        """What the network computes with in place of `weight`; gradients flow back through it."""
        return weight

    def penalty(self, weight: Tensor, **companions: Tensor) -> Tensor | None:
        """What is added to the gradient of `weight` before a step, for methods that say `decays`."""
        return None

    def is_update(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step`."""
        return False

    def update(
        self, step: int, layers: Mapping[str, Layer], masks: Mapping[str, Tensor], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """The masks after optimizer step `step`, from the weights after it and the dense gradients of it."""
        return dict(masks)

    def sparsity_at(self, step: int) -> float | None:
        """The sparsity that the schedule asks for at `step`; a network has it from the last update up to then.

        None where nothing asks for it: it is an outcome of training, or of what the network was before.
        """
        return 0.0

    def regeneration_at(self, step: int) -> float:
        """The share of its active weights that a layer exchanges in an update at `step`."""
        return 0.0


def _check_method(name: str, kind: object) -> None:
    """Raises TypeError unless `kind` is a frozen dataclass derived from `Method`."""
    if not isinstance(kind, type) or not issubclass(kind, Method):
        raise TypeError(f"the method {name!r} must be a class derived from granet.Method, not {described(kind)}")
    if not is_dataclass(kind) or "__dataclass_fields__" not in vars(kind):
        raise TypeError(
            f"the method {name!r} must be a dataclass: write @dataclass(frozen=True, kw_only=True) over "
            f"class {kind.__name__}, below the line that registers it"
        )


METHODS: Registry[type[Method]] = Registry("method", home="granet.methods", check=_check_method)
"""The classes of all methods by name, those of granet and those that plugins register."""


@dataclass(frozen=True, kw_only=True)
class AtInitialization(Method):
    """What methods share that choose the topology of the whole network before training, from a probe, and keep it."""

    sparsity: float

    needs_probe: ClassVar[bool] = True

    def initial_counts(self, shapes):
        return distribution.budget(sum(distribution.uniform(shapes, 1.0).values()), 1 - self.sparsity)

    def sparsity_at(self, step):
        return self.sparsity

    def pruned(
        self, layers: Mapping[str, Layer], scores: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], rounds: int = 1
    ) -> dict[str, Tensor]:
        """The masks of the highest scores: asked for anew in each round, whose densities fall exponentially."""
        masks = {name: layer.weight.new_ones(layer.shape, dtype=bool) for name, layer in layers.items()}
        for t in range(1, rounds + 1):
            scored = {name: criterion.Layer(score) for name, score in scores(masks).items()}
            n = distribution.budget(topology.total_of(layers), (1 - self.sparsity) ** (t / rounds))
            masks = topology.prune_to(masks, n, scored, criterion.own_values)
        return masks


class Grows:
    """What methods share whose updates exchange weights; they come with the fields `growth`, `accumulate`, `interval`.

    `growth="gradient"` grows where the dense gradient is steepest, the mean over the `accumulate` steps up to the
    update; `"momentum"` where the exponential mean of the dense gradients of all steps is; `"random"` anywhere, for
    which no dense gradient is needed.
    """

    @property
    def needs_dense_grad(self) -> bool:
        return self.growth != "random"

    @property
    def last_growth(self) -> int:
        """The last step whose update grows weights."""
        raise NotImplementedError

    def gradient_mix(self, step: int) -> tuple[float, float] | None:
        if self.growth == "random" or step > self.last_growth:
            return None
        if self.growth == "momentum":
            return MOMENTUM
        n = self.accumulate
        ahead = next((i for i in range(n) if self.is_update(step + i)), None)
        if ahead is None:
            return None
        first = ahead == n - 1 or self.is_update(step - 1)
        return (0.0 if first else 1.0), 1 / n

    def exchanged(
        self, masks: Mapping[str, Tensor], layers: Mapping[str, Layer], ratio: float, rng: torch.Generator
    ) -> dict[str, Tensor]:
        """`masks` after a share `ratio` of each layer's active entries was dropped by magnitude and as many were grown.

        A layer without a gradient, frozen or in no path from the loss, keeps its mask where growth is by gradients.
        """
        lose = criterion.magnitude
        if self.growth == "random":
            return {name: topology.rewire(masks[name], layer, ratio, rng, lose=lose) for name, layer in layers.items()}
        known = criterion.with_gradient(layers)
        gain = criterion.gradient
        return masks | {
            name: topology.exchange(masks[name], layer, ratio, lose=lose, gain=gain) for name, layer in known.items()
        }


MOMENTUM = (0.9, 0.1)
"""The exponential mean of dense gradients, as a `gradient_mix`: that of Dettmers & Zettlemoyer 2019."""

GROWTHS = ("gradient", "momentum", "random")


def require_growth(method: Method) -> None:
    """Reject an unknown `growth`, and gradients gathered over more steps than lie between two updates."""
    kind, growth, n = type(method).__name__, method.growth, method.accumulate
    if growth not in GROWTHS:
        raise ValueError(f"{kind}: {unknown('growth', growth, GROWTHS)}")
    require(method, steps=("accumulate",))
    if n > method.interval:
        raise ValueError(f"{kind}: accumulate={n} is more than the interval={method.interval} between two updates")
    if n > 1 and growth != "gradient":
        raise ValueError(f'{kind}: accumulate={n} belongs to growth="gradient", not to {growth!r}')


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


def require_at_least(method: Method, least: float, *names: str) -> None:
    """Refuse numbers below `least`, infinite ones and NaN."""
    for name in names:
        if not least <= getattr(method, name) < float("inf"):
            kind = type(method).__name__
            raise ValueError(f"{kind}: {name}={getattr(method, name)}: a number from {least} up is needed")


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
