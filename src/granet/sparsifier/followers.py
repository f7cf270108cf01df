"""Followers: copies and averages of a model's weights that are kept sparse as the model is.

An average comes as a module, as a dict by names, or as a list of tensors in the order of `model.parameters()`, alone or
as the `shadow_params` of an object (torch_ema, diffusers' EMAModel).
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from granet.names import matched


def tensors_of(follower, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a follower that stand for the named parameters of `model`, without gradients; see `held_by`."""
    return {name: tensor.detach() for name, tensor in held_by(follower, model, names).items()}


def held_by(follower, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The objects themselves that a follower has for the named parameters of `model`.

    Raises:
        TypeError: it is nothing that holds tensors.
        ValueError: one of the parameters has no tensor in it, or one of another shape.
    """
    kind = type(follower).__name__
    parameters = dict(model.named_parameters())
    shadow = getattr(follower, "shadow_params", None)
    if shadow is not None and not isinstance(follower, nn.Module):
        found = _by_position(list(shadow), parameters, f"shadow_params of {kind}")
    elif isinstance(follower, list | tuple):
        found = _by_position(list(follower), parameters, "the list")
    elif isinstance(follower, nn.Module | Mapping):
        named = dict(follower.named_parameters()) if isinstance(follower, nn.Module) else follower
        found = {name: named[other] for name, other in matched(names, named).items()}
    else:
        raise TypeError(
            f"follow(...) takes a module, a dict of tensors, a list of tensors in the order of model.parameters(), or "
            f"an object that has such a list as shadow_params; {kind} is none of these"
        )
    for name in names:
        if name not in found or not isinstance(found[name], Tensor):
            raise ValueError(f"{kind} has no parameter {name!r}: it is no copy of the model")
        if found[name].shape != parameters[name].shape:
            there, here = tuple(found[name].shape), tuple(parameters[name].shape)
            raise ValueError(
                f"{name!r} has shape {there} in {kind}, and {here} in the model: it is no copy of the model"
            )
    return {name: found[name] for name in names}


def _by_position(tensors: list, parameters: Mapping[str, nn.Parameter], what: str) -> dict[str, Tensor]:
    """The tensors by the names of all parameters, or of those that are trained, whichever fit."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for among in (parameters, trained):
        shapes = [p.shape for p in among.values()]
        if len(tensors) == len(among) and [getattr(tensor, "shape", None) for tensor in tensors] == shapes:
            return dict(zip(among, tensors, strict=True))
    raise ValueError(
        f"{what} has {len(tensors)} tensors that do not fit the {len(parameters)} parameters of the model, nor the "
        f"{len(trained)} that are trained: they must have the order and the shapes of model.parameters()"
    )
