"""Sparse neural networks that train sparse: GraNet and its family, on PyTorch.

Names are imported on first use, so that `import granet` and the command line's help do not wait for torch. What is
public stands in `__init__.pyi`, which editors and type checkers read too.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from granet.names import did_you_mean

__version__ = "0.2.0"

_HERE = Path(__file__).parent
_EARLIER = {"distributed": "shards", "sharded": "distributed_checkpoint"}  # names that two modules had before


def _public() -> dict[str, tuple[str, str]]:
    """Public name to the module below granet that has it, and its name there."""
    stub = ast.parse((_HERE / "__init__.pyi").read_text(encoding="utf-8"))
    froms = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in froms for alias in node.names}


_PUBLIC = _public()
__all__ = sorted(_PUBLIC)


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
    name = _EARLIER.get(name, name)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, _PUBLIC)}")
    below, attribute = _PUBLIC[name]
    home = f"{__name__}.{below}" if below else __name__
    place = _HERE.joinpath(*below.split("."), attribute)
    if place.is_dir() or place.with_suffix(".py").exists():
        full = f"{home}.{attribute}"
        return import_module(full) if "torch" in sys.modules else _Lazy(full)
    return getattr(import_module(home), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
