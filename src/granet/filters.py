"""Filters of parameters, as given in `only` and `skip`, and the default for a parameter that no filter matches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from granet.names import described

Filter = str | type | Callable[[str, nn.Module, nn.Parameter], bool]
Filters = Filter | Iterable[Filter] | None

KINDS: dict[str, tuple[type, ...]] = {
    "linear": (nn.Linear, nn.Bilinear),
    "conv": (_ConvNd,),
    "attention": (nn.MultiheadAttention,),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "norm": (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
}

_SPARSE = ("linear", "conv", "attention", "recurrent")


def listed(option: str, filters) -> list[Filter]:
    """One filter, several or None as a list.

    Raises:
        TypeError: something else is among them.
    """
    several = isinstance(filters, Iterable) and not isinstance(filters, str | type)
    found = list(filters) if several else [] if filters is None else [filters]
    for one in found:
        if not isinstance(one, str) and not callable(one):
            raise TypeError(
                f"{option}= has {described(one)}: a filter is a name, a pattern, a kind of layer, a module class or a "
                "function of (name, module, parameter), or a list of these"
            )
    return found


@dataclass(frozen=True)
class Default:
    """Whether a parameter is sparse unless asked otherwise, the reason, and whether a wide pattern brings it in."""

    sparse: bool
    reason: str
    near: bool = False


def by_default(names, training: bool) -> Default:
    """What becomes of a parameter with these names unless asked otherwise, in a model that is trained or not at all."""
    for name, module, parameter in names:
        leaf = name.rpartition(".")[2]
        kind = _kind(module)
        if parameter.ndim < 2:
            return Default(False, "bias, scale or other vector")
        if isinstance(module, ParametrizationList):
            steps = ", ".join(type(step).__name__.lstrip("_") for step in module)
            return Default(False, f"parametrized by {steps}, which computes the weight from it")
        if kind is None:
            reason = f"{type(module).__name__} is no known kind of layer; name it in only= to include it"
            return Default(False, reason, near=True)
        if kind not in _SPARSE:
            return Default(False, kind if len(names) == 1 else f"tied to an {kind} as {name}")
        if leaf[-2:] in ("_g", "_v") and {f"{leaf[:-2]}_g", f"{leaf[:-2]}_v"} <= module._parameters.keys():
            return Default(False, "weight_norm computes the weight from it")
        if "weight" not in leaf:
            return Default(False, f"{leaf} of {type(module).__name__} is no weight")
    if training and not names[0][2].requires_grad:
        return Default(False, "frozen, and could not adapt; name it in only= to include it", near=True)
    return Default(True, _kind(names[0][1]) if len(names) == 1 else f"{_kind(names[0][1])}, {len(names)} uses")


def hits(filters, names, default: Default, wide, used) -> list[Filter]:
    """The filters that match any of a parameter's names; they are noted in `used`, by their ids."""
    found = []
    for one in filters:
        eligible = default.near if id(one) in wide else default.sparse
        if any(_matches(one, *entry, eligible) for entry in names):
            used.add(id(one))
            found.append(one)
    return found


def _kind(module: nn.Module) -> str | None:
    return next((kind for kind, classes in KINDS.items() if isinstance(module, classes)), None)


def _matches(one: Filter, name: str, module: nn.Module, parameter: nn.Parameter, eligible: bool) -> bool:
    path, _, leaf = name.rpartition(".")
    if isinstance(one, str) and one in KINDS:
        return isinstance(module, KINDS[one]) and "weight" in leaf and (parameter.ndim > 1 or one == "norm")
    if isinstance(one, str):
        return one == name or (eligible and (one == path or fnmatchcase(name, one) or fnmatchcase(path, one)))
    if isinstance(one, type):
        own = _kind(module) is None and parameter.ndim > 1
        return isinstance(module, one) and ("weight" in leaf or own)
    return bool(one(name, module, parameter))
