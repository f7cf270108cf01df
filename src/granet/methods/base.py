"""The base class of methods, and what several methods share.

A method is a frozen value: a paper's hyper-parameters, and functions that choose masks. It keeps no state and changes
none of its arguments: `init` and `update` return new masks, and the `Sparsifier` applies them. Steps are optimizer
steps, counted from 1.
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
    from granet.topology import Masks

Steps = Annotated[int, "steps"]
"""A number of optimizer steps; recipes may also write it as epochs, `80ep`, or as a share of training, `50%`."""


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_NEEDED: dict[type, tuple[str, Callable[[object], bool]]] = {  # annotation -> the words for it, and a check of values
    float: ("a number", _is_number),
    int: ("a number", _is_number),  # whether it is whole is checked together with its range
    str: ("a text", lambda value: isinstance(value, str)),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    NoneType: ("None", lambda value: value is None),
}


@cache
def _types(kind: type) -> dict[str, tuple[type, ...]]:
    """Returns the types that each field of a method may have; an empty dict if an annotation cannot be resolved."""
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
    """A way to choose which weights are active, with the hyper-parameters of its paper.

    Class attributes say what a method needs, so that other code never has to check for a particular method:

    - `needs_dense_grad`: updates use the gradients of inactive weights too; this may depend on hyper-parameters.
    - `needs_grad`: updates use at least the gradients of active weights.
    - `replaces_step`: at a topology update, the optimizer does not step.
    - `needs_probe`: `init` measures the network on a few batches by a `granet.Probe`: `init(layers, rng, probe)`.
    - `remembers`: `update` has a dict of tensors that lasts from one update to the next: `update(..., memory)`.
    - `drifts`: the method itself moves active weights after the optimizer's step; see `drift`.
    - `reparameterizes`: the network computes with effective weights, made from the trained ones; see `effective`.
    - `decays`: the method penalises weights itself (`penalty`), so the optimizer should not decay the sparse ones too.
    """

    needs_dense_grad: ClassVar[bool] = False
    replaces_step: ClassVar[bool] = False
    needs_probe: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    drifts: ClassVar[bool] = False
    reparameterizes: ClassVar[bool] = False
    decays: ClassVar[bool] = False

    def __new__(cls, *unnamed, **fields):
        """Reject settings of the wrong type, by the annotations of the fields, before their values are checked."""
        kind = cls.__name__
        if unnamed:
            names = ", ".join(list(_types(cls))[:2])
            raise TypeError(f"{kind} takes its settings by name ({names}, ...), and {described(unnamed[0])} has none")
        for name, value in fields.items():
            allowed = _types(cls).get(name, ())
            fits = [_NEEDED[one][1](value) for one in allowed if one in _NEEDED]
            if fits and not any(fits):
                needed = " or ".join(_NEEDED[one][0] for one in allowed if one in _NEEDED)
                raise TypeError(f"{kind}: {name} is {described(value)}, and {needed} is needed")
        return super().__new__(cls)

    def initial_counts(self, shapes: distribution.Shapes) -> dict[str, int] | int | None:
        """Returns the number of active weights of each layer before training.

        It is one number in total if the layers compete for them, and None if the network decides it.
        """
        return distribution.uniform(shapes, 1.0)

    def final_counts(self, shapes: distribution.Shapes) -> dict[str, int] | int | None:
        """Returns the number of active weights after training, in the same form as `initial_counts`."""
        return self.initial_counts(shapes)

    def init(self, layers: Mapping[str, Layer], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns the initial masks: `initial_counts` active weights at random places, unless a method differs."""
        shapes = topology.shapes_of(layers)
        return topology.random_masks(self.initial_counts(shapes), shapes, rng)

    def gradient_mix(self, step: int) -> tuple[float, float] | None:
        """Returns the factors `(keep, add)` by which the dense gradient of `step` is added to the kept one.

        The new kept gradient is `keep * kept + add * grad`; an update reads it as the `grad` of its layers. None means
        that no update uses the gradient of this step, and nothing is kept. `(0.0, 1.0)` keeps the gradient of this step
        alone, and `(0.9, 0.1)` an exponential mean.
        """
        return (0.0, 1.0) if self.needs_grad and self.is_update(step) else None

    @property
    def needs_grad(self) -> bool:
        return self.needs_dense_grad

    @property
    def averages_gradients(self) -> bool:
        """Whether updates look at dense gradients of several steps, which are kept from step to step."""
        return False

    @property
    def explores(self) -> float | None:
        """How many random inactive weights an update looks at for each active one; None if it looks at all or none.

        They are what `granet.topology.seeds` and `some` draw from the random generator before the update.
        """
        return None

    def candidates(self, step: int, active: int) -> int | None:
        """Returns how many inactive weights a layer can grow at most in an update at `step`.

        A layer that has `active` weights grows those of its largest gradients then, and no other gradient of inactive
        weights matters. None means that nothing is known.
        """
        return None

    def drift(
        self,
        step: int,
        layers: Mapping[str, Layer],
        masks: Mapping[str, Tensor],
        rng: torch.Generator,
        lr: Mapping[str, float],
        memory: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Returns what is added to the weights after optimizer step `step`, by layer, for methods that set `drifts`.

        Args:
            step: the number of the step.
            layers: the sparse parameters.
            masks: the current masks. Changes of inactive weights are ignored.
            rng: the random generator of the topology.
            lr: the learning rate of each layer at this step.
            memory: the dict of tensors that lasts from step to step, and that `update` has as well.
        """
        return {}

    def companions(self, layers: Mapping[str, Layer], masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Returns further tensors that each effective weight is made from, by layer and name.

        This is for methods that set `reparameterizes`; `effective` takes the tensors as keyword arguments. A
        floating-point tensor is a new parameter, trained with the model; one without dimensions is a number. A bool
        tensor has the shape of the weight and is a set of entries. Numbers and sets are computed again at each update.
        The set named `trained` contains the weights that receive gradients.
        """
        return {}

    def effective(self, weight: Tensor, **companions: Tensor) -> Tensor:
        """Returns the tensor that the network uses in place of `weight`; gradients flow back through it."""
        return weight

    def penalty(self, weight: Tensor, **companions: Tensor) -> Tensor | None:
        """Returns what is added to the gradient of `weight` before a step, for methods that set `decays`."""
        return None

    def is_update(self, step: int) -> bool:
        """Returns whether the masks change after optimizer step `step`."""
        return False

    def update(
        self, step: int, layers: Mapping[str, Layer], masks: Mapping[str, Tensor], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """Returns the masks after optimizer step `step`.

        Args:
            step: the number of the step.
            layers: the sparse parameters after the step, with the gradients kept as `gradient_mix` says.
            masks: the masks before the update.
            rng: the random generator of the topology.
        """
        return dict(masks)

    def sparsity_at(self, step: int) -> float | None:
        """Returns the sparsity that the schedule sets at `step`; the network reaches it at the latest update before.

        None means that no sparsity is set: it results from training, or from the masks that the network had before.
        """
        return 0.0

    def regeneration_at(self, step: int) -> float:
        """Returns the share of its active weights that each layer exchanges in an update at `step`."""
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
    """The base of methods that choose the masks of all layers before training, by a probe, and then keep them."""

    sparsity: float

    needs_probe: ClassVar[bool] = True

    def initial_counts(self, shapes):
        return distribution.budget(sum(distribution.uniform(shapes, 1.0).values()), 1 - self.sparsity)

    def sparsity_at(self, step):
        return self.sparsity

    def pruned(
        self, layers: Mapping[str, Layer], scores: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], rounds: int = 1
    ) -> dict[str, Tensor]:
        """Returns masks of the weights with the highest scores, pruned to the sparsity in `rounds` rounds.

        Args:
            layers: the sparse parameters.
            scores: a function from the current masks to the scores of all weights; it is called in each round.
            rounds: the number of rounds. The density falls by the same factor in each.
        """
        masks = {name: layer.weight.new_ones(layer.shape, dtype=bool) for name, layer in layers.items()}
        for t in range(1, rounds + 1):
            scored = {name: criterion.Layer(score) for name, score in scores(masks).items()}
            n = distribution.budget(topology.total_of(layers), (1 - self.sparsity) ** (t / rounds))
            masks = topology.prune_to(masks, n, scored, criterion.own_values)
        return masks


class Grows:
    """The base of methods that exchange weights, with the fields `growth`, `explored`, `accumulate` and `interval`.

    `growth="gradient"` grows the weights with the largest dense gradient, averaged over the last `accumulate` steps
    up to the update. `"momentum"` grows those with the largest exponential mean of the dense gradients of all steps.
    `"explore"` grows those with the largest gradient among random inactive ones, `explored` for each active weight
    (guided stochastic exploration, Heddes et al. 2024). `"random"` grows at random places, without a dense gradient.
    """

    @property
    def needs_dense_grad(self) -> bool:
        return self.growth != "random" and self.last_growth > 0

    @property
    def last_growth(self) -> int:
        """The last step whose update grows weights; 0 if none does."""
        raise NotImplementedError

    @property
    def averages_gradients(self) -> bool:
        return self.growth == "momentum" or self.accumulate > 1

    @property
    def explores(self) -> float | None:
        return self.explored if self.growth == "explore" else None

    def candidates(self, step: int, active: int) -> int | None:
        return topology.part(self.regeneration_at(step), active)

    def gradient_mix(self, step: int) -> tuple[float, float] | None:
        if not self.needs_dense_grad or step > self.last_growth:
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
        self, masks: Masks, layers: Mapping[str, Layer], ratio: float, rng: torch.Generator, before: Masks | None = None
    ) -> dict[str, Tensor]:
        """Returns `masks` after each layer dropped a share `ratio` of its active entries by magnitude and grew as many.

        If growth is by gradients, a layer without one (frozen, or not used by the loss) keeps its mask. Growth by
        exploration draws from the weights that were inactive `before` the update, by default in `masks`.
        """
        if ratio == 0:
            return dict(masks)
        lose = criterion.magnitude
        if self.growth == "random":
            return {name: topology.rewire(masks[name], layer, ratio, rng, lose=lose) for name, layer in layers.items()}
        before = masks if before is None else before
        seeds = topology.seeds(before, rng) if self.growth == "explore" else {}
        known = criterion.with_gradient(layers)

        found, gain = dict(masks), criterion.gradient
        for name, layer in known.items():
            among = topology.some(before[name], self.explored, seeds[name]) if seeds else None
            found[name] = topology.exchange(masks[name], layer, ratio, lose=lose, gain=gain, among=among)
        return found


MOMENTUM = (0.9, 0.1)
"""The exponential mean of dense gradients, as a `gradient_mix`: that of Dettmers & Zettlemoyer 2019."""

GROWTHS = ("gradient", "momentum", "explore", "random")


def require_growth(method: Method) -> None:
    """Reject an unknown `growth`, and an `accumulate` of more steps than there are between two updates."""
    kind, growth, n = type(method).__name__, method.growth, method.accumulate
    if growth not in GROWTHS:
        raise ValueError(f"{kind}: {unknown('growth', growth, GROWTHS)}")
    require(method, steps=("accumulate",))
    if not 0 < method.explored < float("inf"):
        raise ValueError(f"{kind}: explored={method.explored} must be a finite number above 0")
    if method.explored != 1.0 and growth != "explore":
        raise ValueError(f'{kind}: explored={method.explored} has an effect with growth="explore", not {growth!r}')
    if n > method.interval:
        raise ValueError(f"{kind}: accumulate={n} is more than the interval={method.interval} between two updates")
    if n > 1 and growth != "gradient":
        raise ValueError(f'{kind}: accumulate={n} requires growth="gradient", not {growth!r}')


def require(
    method: Method, *, sparsity: tuple[str, ...] = (), share: tuple[str, ...] = (), steps: tuple[str, ...] = ()
):
    """Reject hyper-parameters outside their range.

    Args:
        method: the method that is being constructed.
        sparsity: names of fields that must lie in [0, 1).
        share: names of fields that must lie in [0, 1].
        steps: names of fields that must be positive whole numbers.

    Raises:
        ValueError: the message has the field, its value and what is allowed.
    """
    kind = type(method).__name__
    for name in sparsity:
        if not 0 <= getattr(method, name) < 1:
            raise ValueError(
                f"{kind}: {name}={getattr(method, name)} is outside [0, 1): it must be the share of inactive weights"
            )
    for name in share:
        if not 0 <= getattr(method, name) <= 1:
            raise ValueError(f"{kind}: {name}={getattr(method, name)} is outside [0, 1]")
    for name in steps:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{kind}: {name}={value!r} is not a positive number of steps")


def require_at_least(method: Method, least: float, *names: str) -> None:
    """Reject numbers below `least`, infinite ones and NaN."""
    for name in names:
        if not least <= getattr(method, name) < float("inf"):
            kind = type(method).__name__
            raise ValueError(f"{kind}: {name}={getattr(method, name)} must be a finite number of at least {least}")


def require_order(method: Method, *names: str) -> None:
    """Reject steps that are not in ascending order, `begin <= end <= total` for example."""
    values = [getattr(method, name) for name in names]
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in values) or values != sorted(
        values
    ):
        settings = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise ValueError(
            f"{type(method).__name__}: {settings} must be whole numbers of steps with 0 <= {' <= '.join(names)}"
        )


def require_scope(method: Method) -> None:
    """Reject a `scope` other than "global" and "layerwise"."""
    if method.scope not in ("global", "layerwise"):
        raise ValueError(f"{type(method).__name__}: scope={method.scope!r} must be 'global' or 'layerwise'")
