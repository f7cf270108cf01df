"""Sparse neural networks that train sparse: GraNet and its family, on PyTorch.

Names are imported on first use, so that `import granet` and the command line's help do not wait for torch.
"""

import sys
from importlib import import_module
from importlib.util import LazyLoader, find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granet import criterion as criterion
    from granet import distribution as distribution
    from granet import flops as flops
    from granet import models as models
    from granet import pattern as pattern
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
    "schedule",
    "sharded",
    "topology",
)

__all__ = [*_HOME, *_MODULES]


def _lazy_module(name: str) -> ModuleType:
    """The submodule `name`, executed when one of its attributes is first read."""
    full = f"{__name__}.{name}"
    if full not in sys.modules:
        spec = find_spec(full)
        spec.loader = LazyLoader(spec.loader)
        sys.modules[full] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def __getattr__(name: str):
    if name in _MODULES:
        return _lazy_module(name)
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
