"""The laboratory: many runs side by side, on this machine or on a cluster, and what they say together.

For a notebook: `pruning_plasticity`, `layer_sensitivity` and `connectivity_of` return tables that can be printed, drawn
and saved. These names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granet.lab.connectivity import connectivity_of as connectivity_of
    from granet.lab.plasticity.run import pruning_plasticity as pruning_plasticity
    from granet.lab.sensitivity import layer_sensitivity as layer_sensitivity

_HOME = {
    "connectivity_of": "connectivity",
    "layer_sensitivity": "sensitivity",
    "pruning_plasticity": "plasticity.run",
}

__all__ = [*_HOME]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
