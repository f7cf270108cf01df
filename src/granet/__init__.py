"""Sparse neural networks that train sparse: GraNet and its family, on PyTorch.

Names are imported on first use, so that `import granet` and the command line's help do not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from granet.names import did_you_mean

if TYPE_CHECKING:
    from granet import criterion as criterion
    from granet import distribution as distribution
    from granet import flops as flops
    from granet import models as models
    from granet import pattern as pattern
    from granet import ranks as ranks
    from granet import schedule as schedule
    from granet import topology as topology
    from granet.engine.inference import compile as compile
    from granet.engine.training import accelerate as accelerate
    from granet.importers import import_masks as import_masks
    from granet.methods import ACDC as ACDC
    from granet.methods import DSR as DSR
    from granet.methods import GMP as GMP
    from granet.methods import MEST as MEST
    from granet.methods import METHODS as METHODS
    from granet.methods import SET as SET
    from granet.methods import SNFS as SNFS
    from granet.methods import SNIP as SNIP
    from granet.methods import STR as STR
    from granet.methods import DeepR as DeepR
    from granet.methods import Dense as Dense
    from granet.methods import Fixed as Fixed
    from granet.methods import GraNet as GraNet
    from granet.methods import GraSP as GraSP
    from granet.methods import Method as Method
    from granet.methods import RigL as RigL
    from granet.methods import RigLITOP as RigLITOP
    from granet.methods import Static as Static
    from granet.methods import SynFlow as SynFlow
    from granet.methods import TopKAST as TopKAST
    from granet.probe import Probe as Probe
    from granet.selection import plan as plan
    from granet.sparsifier import Sparsifier as Sparsifier

__version__ = "0.1.0"

_HOME = {
    "Dense": "methods",
    "Fixed": "methods",
    "GMP": "methods",
    "ACDC": "methods",
    "DSR": "methods",
    "DeepR": "methods",
    "MEST": "methods",
    "RigLITOP": "methods",
    "SNFS": "methods",
    "GraNet": "methods",
    "GraSP": "methods",
    "METHODS": "methods",
    "Method": "methods",
    "RigL": "methods",
    "SET": "methods",
    "SNIP": "methods",
    "STR": "methods",
    "Static": "methods",
    "SynFlow": "methods",
    "TopKAST": "methods",
    "accelerate": "engine.training",
    "compile": "engine.inference",
    "import_masks": "importers",
    "plan": "selection",
    "Probe": "probe",
    "Sparsifier": "sparsifier",
}
_MODULES = (
    "criterion",
    "distributed",
    "distribution",
    "flops",
    "lab",
    "models",
    "pattern",
    "ranks",
    "schedule",
    "sharded",
    "topology",
)

__all__ = [*_HOME, *_MODULES]


class _Lazy(ModuleType):
    """A submodule that is imported when one of its attributes is first read, set or listed.

    Only then does it come into `sys.modules`: others look through all modules there, torch while it is itself being
    imported, and must not be what imports it.
    """

    def __getattr__(self, name: str):
        module = self.__dict__.get("_module")
        if module is None:
            module = self.__dict__["_module"] = import_module(self.__name__)
        return getattr(module, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(import_module(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(import_module(self.__name__), name)

    def __dir__(self) -> list[str]:
        return dir(import_module(self.__name__))

    def __repr__(self) -> str:
        return f"<module {self.__name__!r}, imported on first use>"


def __getattr__(name: str):
    if name in _MODULES:
        full = f"{__name__}.{name}"
        return import_module(full) if "torch" in sys.modules else _Lazy(full)
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
