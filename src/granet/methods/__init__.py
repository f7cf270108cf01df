"""The methods: one paper, one file, and no method imports another.

Each file registers its class in `METHODS` under a name, and is imported here because it lies in this folder.
"""

from importlib import import_module
from pkgutil import iter_modules

from granet.methods.base import METHODS

__all__ = ["METHODS"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
