"""`save_pretrained`, `from_pretrained` and `push_to_hub` with weights in a small file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from torch import nn

from granet import files
from granet.hub import card
from granet.storage.contents import about, tensors_of
from granet.storage.saving import load, save

try:
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
except ImportError as error:
    raise ModuleNotFoundError('sharing needs huggingface_hub: pip install "granet[hub]"') from error

WEIGHTS = "model.granet.safetensors"  # not model.safetensors, in which other libraries expect dense tensors
LIBRARY = "granet"
TAGS = ["sparse", "pruning", "granet"]


class SparseHubMixin(ModelHubMixin, library_name=LIBRARY, tags=TAGS):
    """Gives a model class `save_pretrained`, `from_pretrained` and `push_to_hub`, all of `huggingface_hub`'s own mixin.

    The folder or repository gets the weights in a small file of `granet.save`, `config.json` with the arguments that
    the model was made with, and a model card, unless there is one. Arguments must be values that JSON can hold.

    >>> import granet, tempfile, torch
    >>> class Classifier(torch.nn.Module, granet.hub.SparseHubMixin):
    ...     def __init__(self, width: int):
    ...         super().__init__()
    ...         self.head = torch.nn.Linear(width, 10)
    ...     def forward(self, x):
    ...         return self.head(x)
    >>> model = Classifier(width=64)
    >>> sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.9))
    >>> folder = tempfile.mkdtemp()
    >>> _ = model.save_pretrained(folder)  # model.push_to_hub("user/name") uploads the same
    >>> other = Classifier.from_pretrained(folder)
    >>> torch.equal(other.head.weight, model.head.weight)
    True
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self._stored(), save_directory / WEIGHTS)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **arguments: Any,
    ) -> Self:
        path = weights_file(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        model = cls(**arguments)
        load(path, into=model._stored())
        return model

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Returns the card of this model: its sparsity layer by layer, and how to load it."""
        name = type(self).__name__
        lines = [f"{name}.from_pretrained(...)  # {type(self).__module__}.{name}"]
        text = card.written(name, tensors_of(self), about(self, tensors_of(self)), load_lines=lines)
        return ModelCard(text)

    def _stored(self) -> nn.Module:
        """Returns the module whose tensors are in the file."""
        assert isinstance(self, nn.Module)
        return self


def weights_file(model_id: str, **options: Any) -> Path:
    """Returns the file of weights in a local folder or in a repository of the Hub, downloaded if need be.

    Raises:
        FileNotFoundError: if there is none.
    """
    return repository_file(model_id, WEIGHTS, **options)


def repository_file(model_id: str, name: str, **options: Any) -> Path:
    """Returns a file in a local folder or in a repository of the Hub, downloaded if need be.

    Raises:
        FileNotFoundError: if there is none.
    """
    missing = f"{model_id} has no {name}: it was not saved by granet"
    folder = Path(model_id)
    if folder.is_dir():
        if not files.there(folder / name):
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
            raise FileNotFoundError(f"{missing}; it holds {there or 'nothing'}")
        return folder / name
    try:
        return Path(hf_hub_download(repo_id=model_id, filename=name, **options))
    except EntryNotFoundError:
        raise FileNotFoundError(missing) from None
