"""Saving and restoring the state of a sparsifier, and checking masks that come from elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from granet import shards
from granet.criterion import Layer
from granet.methods.base import Method
from granet.names import described, matched
from granet.pattern import Pattern
from granet.probe import Probe
from granet.ranks import current
from granet.sparsifier import masking
from granet.sparsifier.ever import EverActive
from granet.topology import count

_KEYS = {"method", "pattern", "step", "version", "overdue", "folded", "rng", "masks", "ever", "gradients", "memory"}


def checked_masks(
    masks: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    pattern: Pattern | None = None,
    method: Method | None = None,
) -> dict[str, Tensor]:
    """Copies of `masks` in the order of `parameters`.

    Raises:
        ValueError: a name is missing or unknown, or a mask is no bool tensor of its parameter's shape, or is empty,
            or does not obey the pattern; or the method finds its masks by training alone.
    """
    if method is not None and method.reparameterizes and method.sparsity_at(0) is None:
        raise ValueError(f"{type(method).__name__} finds its masks by training: it cannot start from masks=")
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"masks= is {described(masks)}: a dict from the names of parameters to bool tensors is needed, "
            "{name: mask for name, mask in zip(names, masks)} say"
        )
    mine = {other: name for name, other in matched(parameters, masks).items()}
    masks = {mine.get(name, name): mask for name, mask in masks.items()}
    if set(masks) != set(parameters):
        name = sorted(set(masks) ^ set(parameters))[0]
        raise ValueError(f"masks: {name!r} is " + ("no sparse parameter of the model" if name in masks else "missing"))
    for name, p in parameters.items():
        mask = masks[name]
        if not isinstance(mask, Tensor):
            raise TypeError(f"masks: {name!r} is a {type(mask).__name__}: a bool tensor is needed")
        if mask.dtype != torch.bool or mask.shape != p.shape:
            raise ValueError(
                f"masks: {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"torch.bool of shape {tuple(p.shape)} is needed"
            )
        if not count(mask):
            raise ValueError(f"masks: {name!r} has no active weight; a layer needs at least one")
        if pattern and not pattern.obeyed(mask):
            raise ValueError(f"masks: {name!r} does not obey pattern {pattern}")
    return {name: masks[name].clone() for name in parameters}


def probe_argument(probe: Probe | None, method: Method, parameters: Mapping[str, Tensor]) -> tuple[Probe, ...]:
    """Returns the further arguments of the method's `init`: the probe if the method needs one, else none.

    Raises:
        ValueError: the method needs one, and there is none, or it would look at shards.
    """
    if not method.needs_probe:
        return ()
    kind = type(method).__name__
    if any(map(shards.is_sharded, parameters.values())):
        raise ValueError(
            f"{kind} looks at gradients before training, through a whole network, and this one is sharded: choose the "
            "masks before, in the same way on all ranks, and take them over: Sparsifier(..., masks=masks)"
        )
    if probe is not None and not isinstance(probe, Probe):
        raise TypeError(f"probe= is {described(probe)}: a granet.Probe(model, batches) is needed")
    if probe is None:
        raise ValueError(
            f"{kind} looks at gradients before training: give Sparsifier(...) a probe=granet.Probe(model, batches)"
        )
    return (probe,)


def initial_masks(
    policy: Method, layers: Mapping[str, Layer], rng: torch.Generator, probes: tuple[Probe, ...], broadcast: bool
) -> dict[str, Tensor]:
    """Returns the initial masks, chosen by the method's `init`.

    Args:
        policy: the method, as the pattern has it choose.
        layers: the sparse parameters.
        rng: the random generator of the topology.
        probes: the further arguments of `init`; see `probe_argument`.
        broadcast: whether masks that come from a probe are those of the first rank on all ranks. Ranks may measure
            other batches, or sum up the same ones in another order, and would then choose other weights. Only the first
            rank measures, and the others take over its masks and the state of its generator.
    """
    if not (probes and broadcast):
        return policy.init(layers, rng, *probes)

    def answer():
        return {name: mask.cpu() for name, mask in policy.init(layers, rng, *probes).items()}, rng.get_state()

    masks, generator = current().decide(answer)
    rng.set_state(generator)
    return masks


def refuse_foreign(
    state: Mapping[str, Any], method: Method, masks: Mapping[str, Tensor], pattern: Pattern, *, folded: bool
) -> None:
    """Rejects a state of another method or pattern, or with masks of other shapes.

    Raises:
        ValueError: says what differs.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{described(state)} was given: what state_dict() of a sparsifier returned is needed")
    missing = _KEYS - set(state)
    if missing:
        raise ValueError(f"this is no state of a sparsifier, or a damaged one: it has no {', '.join(sorted(missing))}")
    if state["method"] != repr(method):
        raise ValueError(f"the state is of {state['method']}, this sparsifier runs {method!r}")
    if state["pattern"] != str(pattern):
        raise ValueError(f"the state obeys pattern {state['pattern']}, this sparsifier {pattern}")
    if state["folded"] != folded:
        raise ValueError(
            "the state was taken after fold(): call fold() on this sparsifier too, before the model's state is loaded"
            if state["folded"]
            else "the state was taken before fold(): load it into a sparsifier that is not folded"
        )
    for name, mask in (*state["masks"].items(), *state["ever"].items()):
        if mask.dtype != torch.bool:
            raise ValueError(f"this is a damaged state of a sparsifier: the mask of {name!r} is {mask.dtype}")
    shapes = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
    mine = {name: tuple(mask.shape) for name, mask in masks.items()}
    if shapes != mine:
        name, shape = sorted(set(shapes.items()) ^ set(mine.items()))[0]
        raise ValueError(f"the state is of another model: {name!r} of shape {shape} is only in one of them")


_PARTS = ("masks", "ever", "gradients", "memory")


def renamed(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the state under this model's names, whatever prefixes a wrapper (`torch.compile`, DDP) has added."""
    if not isinstance(state, Mapping) or not all(isinstance(state.get(part), Mapping) for part in _PARTS):
        return state
    own = {other: name for name, other in matched(parameters, state["masks"]).items()}

    def name(key: str) -> str:
        parameter, colon, rest = key.partition(":")
        return own.get(parameter, parameter) + colon + rest

    return dict(state) | {part: {name(key): value for key, value in state[part].items()} for part in _PARTS}


class Aside:
    """Inactive weights that are set aside, as they were before masks set them to zero ahead of the first step.

    The sparsifier's own masks may come later than the weights that were trained with them: when a run is resumed, the
    model is loaded first, say. What was taken by the first masks is then given back, and the loaded masks decide.
    """

    def __init__(self):
        self._taken: dict[str, tuple[Tensor, Tensor, int]] = {}

    @contextmanager
    def taking(self, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Keeps copies of the inactive weights, which are set to zero within the `with` block."""
        weights = {name: shards.local(parameters[name].detach()) for name in masks}
        actives = {name: shards.local(mask) for name, mask in masks.items()}
        values = {name: weight[~actives[name]] for name, weight in weights.items() if weight.device.type != "meta"}
        yield
        self._taken = {
            name: (actives[name], taken, weights[name]._version) for name, taken in values.items() if taken.any()
        }

    @torch.no_grad()
    def give_back(self, parameters: Mapping[str, Tensor]) -> None:
        """Restores the weights, except in parameters that were changed since."""
        for name, (active, values, version) in self._taken.items():
            weight = shards.local(parameters[name].detach())
            if weight._version == version and weight.device == values.device:
                weight[~active] = values
        self._taken = {}


def packed(parts: Mapping[str, Mapping[str, Tensor]], **rest: Any) -> dict[str, Any]:
    """Returns a sparsifier's state: copies of the tensors in `parts`, and the other entries as they are."""
    return rest | {key: {name: tensor.clone() for name, tensor in part.items()} for key, part in parts.items()}


def unpacked(
    state: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], EverActive, dict[str, Tensor], dict[str, Tensor]]:
    """Returns copies of the masks, the weights ever active, the kept gradients and the memory in `state`.

    They lie where their parameters lie; see `moved`.
    """
    parts = {key: moved(state[key], parameters) for key in _PARTS}
    copies = {key: {name: value.clone() for name, value in parts[key].items()} for key in _PARTS if key != "ever"}
    return copies["masks"], EverActive(parts["ever"]), copies["gradients"], copies["memory"]


def moved(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors on the devices and in the shards of the parameters of the same name and shape.

    Tensors that lie there already, and those without such a parameter, are returned as they are. To turn shards into
    whole tensors, all ranks must call this together.
    """

    def move(name: str, value: Tensor) -> Tensor:
        p = parameters.get(name)
        if p is None or value.shape != p.shape:
            return value
        return masking.like(value, p) if value.dtype == torch.bool else shards.place_like(value, p)

    return {name: move(name, value) for name, value in tensors.items()}
