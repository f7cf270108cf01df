"""Sharing through the Hugging Face Hub: small files, configuration, recipe, and a model card written from the run.

- `Network` is a run's network with its normalisation, which anyone loads in three lines;
- `SparseHubMixin` gives a model class of your own `save_pretrained`, `from_pretrained` and `push_to_hub`;
- `save_transformers` and `load_transformers` do the same for a model of `transformers`.

Names are imported on first use, because they need `huggingface_hub`: `pip install "granet[hub]"`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granet.hub.mixin import SparseHubMixin as SparseHubMixin
    from granet.hub.network import Network as Network
    from granet.hub.transformers import load_transformers as load_transformers
    from granet.hub.transformers import save_transformers as save_transformers

_HOME = {
    "Network": "network",
    "SparseHubMixin": "mixin",
    "load_transformers": "transformers",
    "save_transformers": "transformers",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
