"""Sparse models of `transformers`: their own configuration, weights in a small file, a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from granet import files
from granet.hub import card
from granet.hub.mixin import WEIGHTS, repository_file
from granet.names import described
from granet.storage.contents import about, tensors_of
from granet.storage.saving import load, save

try:
    import transformers
except ImportError as error:
    raise ModuleNotFoundError('models of transformers need it: pip install "granet[huggingface]"') from error


def save_transformers(model: transformers.PreTrainedModel, folder: str | Path, dtype: str | None = None) -> None:
    """Writes a sparse model of transformers into a folder: a small file of weights, its configuration, and a card.

    `model.save_pretrained(folder)`, its own method, writes dense tensors with zeros instead, which every version of
    transformers reads. The card is left alone if there is one.

    Args:
        model: the model.
        folder: the folder, made if it is not there.
        dtype: the type of the stored numbers; see `granet.save`.

    Raises:
        TypeError: if it is no model of transformers.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"the model is {described(model)}, and a transformers.PreTrainedModel is needed")
    folder, name = Path(folder), type(model).__name__
    if not hasattr(transformers, name):
        raise TypeError(f"{name} is no class of transformers itself: use granet.hub.SparseHubMixin for your own")
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [name]
    model.config.save_pretrained(folder)
    save(model, folder / WEIGHTS, dtype)
    if not files.there(folder / "README.md"):
        tensors = tensors_of(model)
        lines = ["import granet", 'model = granet.hub.load_transformers("user/name")  # or a folder']
        files.replace(folder / "README.md", card.written(name, tensors, about(model, tensors), lines))


def load_transformers(source: str | Path, **options: Any) -> transformers.PreTrainedModel:
    """Returns a model that `save_transformers` has saved, in evaluation mode; its class is one of transformers' own.

    Args:
        source: a folder, or the name of a repository on the Hub.
        **options: of `huggingface_hub.hf_hub_download`: `revision`, `cache_dir`, `token` and others.

    Raises:
        FileNotFoundError: if there are no weights of granet.
        ValueError: if the configuration names no class of transformers, or the weights do not fit.
    """
    weights = repository_file(str(source), WEIGHTS, **options)
    folder = repository_file(str(source), "config.json", **options).parent
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    name = (config.architectures or ["none"])[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{source}: its configuration names {name!r} as architecture, which transformers does not have"
        )
    model = kind(config)
    load(weights, into=model)
    return model.eval()
