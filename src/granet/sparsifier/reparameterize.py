"""Effective weights: what a network computes with, where a method trains something else.

A method that `reparameterizes` (STR, Top-KAST, Feather) trains a parameter and has the network compute with
`method.effective(parameter, ...)`. The class of the parameter's module gets a property of the parameter's name:
whoever reads `module.weight`, the module itself or another one, reads the effective weight, through which gradients
flow. The parameter stays in the module under its name, for `named_parameters()`, the optimizer and the state dict.

(`torch.nn.utils.parametrize` works by a property as well, but moves the parameter, and with it the keys of state dicts
and masks.) Copies, pickles and `torch.compile` of the model follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from granet import shards
from granet.criterion import Layer
from granet.methods.base import Method
from granet.names import matched
from granet.selection import Choice
from granet.sparsifier import masking

_FIELD = "_reparameterized"  # of a module: leaf name -> method, companions' names -> their attributes


class Reparameterization:
    """The effective weights of a model's sparse parameters, from now on until `fold`.

    What the method needs beside the weights, its companions, lies in the modules too: a learned one is a parameter,
    `threshold` beside `weight` say, a set of places a buffer that the state dict leaves out.

    Args:
        model: the model.
        choices: its sparse parameters.
        method: a method that `reparameterizes`.
        masks: the masks to start from.

    Raises:
        ValueError: a parameter is used in a way that no property can reach, or is reparameterized already.
    """

    def __init__(self, model: nn.Module, choices: list[Choice], method: Method, masks: Mapping[str, Tensor]):
        self.model, self.method = model, method
        self._parameters = {choice.name: choice.parameter for choice in choices}
        self._aliases = {choice.name: (choice.name, *choice.aliases) for choice in choices}
        for name, parameter in self._parameters.items():
            self._refuse(name, parameter)
        for name, tensors in self._companions(masks).items():
            self._install(name, tensors)

    def _companions(self, masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What effective weights are made from beside the parameters, under these masks."""
        layers = {name: Layer(parameter.detach()) for name, parameter in self._parameters.items()}
        return self.method.companions(layers, masks)

    def _refuse(self, name: str, parameter: nn.Parameter) -> None:
        advice = f"{type(self.method).__name__} cannot train it; leave it dense with skip={name!r}"
        if shards.is_sharded(parameter):
            raise ValueError(f"{name!r} is sharded over ranks: {advice}")
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(f"the model has a scripted {type(module).__name__}, whose attributes cannot change")
            lists = {key: value for key, value in vars(module).items() if isinstance(value, list | tuple)}
            held = [key for key, values in lists.items() if any(value is parameter for value in values)]
            if held:
                raise ValueError(
                    f"{type(module).__name__} uses {name!r} through a list of its own, {held[0]}: {advice}"
                )
        for module, leaf in _owners(self.model, self._aliases[name]):
            if leaf in getattr(module, _FIELD, {}):
                raise ValueError(f"{name!r} is reparameterized by another sparsifier: call its fold() first")

    def _install(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        parameter = self._parameters[name]
        learned = {k: nn.Parameter(t) for k, t in tensors.items() if t.is_floating_point() and t.ndim}
        for module, leaf in _owners(self.model, self._aliases[name]):
            if leaf in getattr(module, _FIELD, {}):
                continue  # the module stands in the model under two names
            attributes = {key: leaf.replace("weight", key) if "weight" in leaf else f"{leaf}_{key}" for key in tensors}
            for key, attribute in attributes.items():
                if key in learned:
                    module.register_parameter(attribute, learned[key])
                else:
                    tensor = tensors[key]
                    places = masking.like(tensor, parameter) if tensor.ndim else tensor.to(parameter.device)
                    module.register_buffer(attribute, places.clone(), persistent=False)
            fields = {**getattr(module, _FIELD, {}), leaf: (self.method, attributes)}
            _become(module, fields)

    @torch.no_grad()
    def layers(self) -> dict[str, Layer]:
        """The parameters as layers, with the effective weights."""
        return {
            name: Layer(parameter.detach(), effective=self.effective(name))
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def effective(self, name: str) -> Tensor:
        """What the network computes with in place of the parameter `name`."""
        module, leaf = _owner(self.model, name)
        return getattr(module, leaf)

    def learned(self) -> dict[str, nn.Parameter]:
        """The companions that are trained, by their names in the model."""
        found = {}
        for name in self._parameters:
            module, leaf = _owner(self.model, name)
            for attribute in vars(module)[_FIELD][leaf][1].values():
                if attribute in module._parameters:
                    found[f"{name.removesuffix(leaf)}{attribute}"] = getattr(module, attribute)
        return found

    def trained(self) -> dict[str, Tensor]:
        """The places that gradients reach, where these are a set that the method keeps."""
        return {key.removesuffix(":trained"): places for key, places in self.places().items() if ":trained" in key}

    def places(self) -> dict[str, Tensor]:
        """The companions that are sets of places, as `parameter:companion`; they belong to the state of training."""
        return {
            f"{name}:{key}": getattr(module, attribute)
            for name in self._parameters
            for module, leaf in [_owner(self.model, name)]
            for key, attribute in vars(module)[_FIELD][leaf][1].items()
            if attribute in module._buffers
        }

    @torch.no_grad()
    def renew(self, masks: Mapping[str, Tensor], places: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The sets of places that go with new masks, or those given, put into the model."""
        if places is None:
            companions = self._companions(masks)
            places = {f"{name}:{key}": tensor for name in companions for key, tensor in companions[name].items()}
        self.put(self.model, places)
        return self.places()

    @torch.no_grad()
    def put(self, root: nn.Module, places: Mapping[str, Tensor]) -> None:
        """Put sets of places into the model, or into a copy of it.

        Raises:
            ValueError: the copy was made before the sparsifier, so that it does not know of effective weights.
        """
        every = [name for aliases in self._aliases.values() for name in aliases]
        known = matched(every, [name for name, _ in root.named_parameters(remove_duplicate=False)])
        for name, aliases in self._aliases.items():
            for module, leaf in _owners(root, tuple(known.get(alias, alias) for alias in aliases)):
                if leaf not in getattr(module, _FIELD, {}):
                    raise ValueError(
                        f"{type(root).__name__} computes with {name!r} itself, the model with an effective weight: "
                        "copy the model after the sparsifier is made"
                    )
                for key, attribute in getattr(module, _FIELD)[leaf][1].items():
                    if attribute in module._buffers:
                        getattr(module, attribute).copy_(places[f"{name}:{key}"])

    @torch.no_grad()
    def penalise(self, scale: Tensor | None, names: Iterable[str]) -> None:
        """Add the gradient of the method's own penalty to the named gradients, which may carry a scaler's factor."""
        for name in names:
            parameter = self._parameters[name]
            if parameter.grad is None:
                continue
            module, leaf = _owner(self.model, name)
            companions = {key: getattr(module, a) for key, a in vars(module)[_FIELD][leaf][1].items()}
            penalty = self.method.penalty(parameter.detach(), **companions)
            if penalty is not None:
                parameter.grad.add_(penalty if scale is None else penalty * scale)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The state dict of the plain model that computes the same: effective weights, no companions."""
        state = dict(self.model.state_dict())
        effective = {name: self.effective(name) + 0.0 for name in self._parameters}
        for name, aliases in self._aliases.items():
            for module, leaf in _owners(self.model, aliases):
                for attribute in vars(module)[_FIELD][leaf][1].values():
                    for alias in aliases:
                        state.pop(f"{alias.rpartition('.')[0]}.{attribute}".lstrip("."), None)
            state |= {alias: effective[name] for alias in aliases if alias in state}
        return state


def is_reparameterized(model: nn.Module) -> bool:
    """Whether the model computes with effective weights."""
    return any(_FIELD in vars(module) for module in model.modules())


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Turn a model, or a copy of one, into a plain one: its parameters become what it computes with."""
    owners = [(module, leaf) for module in model.modules() for leaf in vars(module).get(_FIELD, {})]
    values = {module._parameters[leaf]: getattr(module, leaf) + 0.0 for module, leaf in owners}  # + 0.0: no -0.0
    for module, leaf in owners:
        fields = dict(vars(module)[_FIELD])
        for attribute in fields.pop(leaf)[1].values():
            delattr(module, attribute)
        _become(module, fields)
    for parameter, value in values.items():
        parameter.copy_(value)


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Have the model compute with its parameters themselves, for those who look at shapes alone."""
    classes = {module: type(module) for module in model.modules() if hasattr(type(module), "_plain")}
    try:
        for module, kind in classes.items():
            module.__class__ = kind._plain
        yield
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def _owners(root: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold a parameter with these names, and its name there."""
    return (_owner(root, name) for name in names)


def _become(module: nn.Module, fields: Mapping) -> None:
    """Give the module the class in which these parameters are effective, its own class where there are none."""
    plain = getattr(type(module), "_plain", type(module))
    module.__dict__.pop(_FIELD, None)
    if fields:
        module.__dict__[_FIELD] = dict(fields)
    module.__class__ = _class_of(plain, tuple(fields)) if fields else plain


@cache
def _class_of(plain: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """The class `plain` with a property for each of the leaves."""

    def effective(leaf: str) -> property:
        def read(module: nn.Module) -> Tensor:
            method, attributes = module.__dict__[_FIELD][leaf]
            companions = {key: getattr(module, attribute) for key, attribute in attributes.items()}
            return method.effective(module._parameters[leaf], **companions)

        return property(read)

    def reduce(module: nn.Module, protocol: int) -> tuple:
        return _revive, (plain, leaves), module.__getstate__()

    names = {"_plain": plain, "__reduce_ex__": reduce, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), names | {leaf: effective(leaf) for leaf in leaves})


def _revive(plain: type[nn.Module], leaves: tuple[str, ...]) -> nn.Module:
    kind = _class_of(plain, leaves)
    return kind.__new__(kind)
