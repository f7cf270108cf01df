"""A run's network with its normalisation, to share and to load."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from granet import files
from granet.hub import card
from granet.hub.mixin import SparseHubMixin, repository_file
from granet.sparsifier.reparameterize import fold
from granet.train import models
from granet.train.run import Run, load_weights
from granet.train.trainer import Trainer

TEXTS = ("README.md", "recipe.yaml", "summary.json")


class Network(nn.Module, SparseHubMixin):
    """A network of granet's catalog that takes images with values from 0 to 1, and returns one score per class.

    `Network.from_run("runs/...")` makes it from a run, `Network.from_pretrained("user/name")` from the Hub or a folder.
    The module `network` inside is the plain one, whose weights are in the file.

    Args:
        model: the name of the network, one of `granet ls models`.
        classes: the number of classes.
        size: channels, height and width of an image.
        mean: the mean of each channel that is subtracted from images.
        std: the deviation of each channel that images are divided by.
    """

    def __init__(self, model: str, classes: int, size: list[int], mean: list[float], std: list[float]):
        super().__init__()
        self.network = models.build(model, classes=classes, in_channels=size[0])
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self._texts: dict[str, str] = {}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores of shape (images, classes) for images of shape (images, channels, height, width)."""
        return self.network((images - self.mean) / self.std)

    @staticmethod
    def from_run(path: str | Path, checkpoint: str | None = None) -> Network:
        """Returns the network of a finished run, in evaluation mode, with the run's model card.

        Args:
            path: a run directory.
            checkpoint: "best", "last", or None for the best if there is one.

        Raises:
            FileNotFoundError: if it is no run directory.
            ValueError: if the run is not finished.
            CheckpointError: if there is no such checkpoint, or it is damaged.
        """
        run = Run.open(Path(path))
        summary = run.summary
        if summary is None:
            raise ValueError(f"{path} is not finished, so there is no accuracy to give: granet resume {path}")
        trainer = Trainer(run.recipe, begins=False)
        step = load_weights(run, trainer, checkpoint)
        data = trainer.dataset
        made = Network(
            model=run.recipe.model.name,
            classes=data.classes,
            size=list(data.shape),
            mean=list(data.mean),
            std=list(data.std),
        )
        if trainer.ema is None:
            made.network.load_state_dict(trainer.sparsifier.plain_state_dict())
        else:
            fold(trainer.ema)
            made.network.load_state_dict(trainer.ema.state_dict())
        score = next(s for s in (summary["best"], summary["last"]) if s is not None and s["step"] == step)
        texts = card.of_run(run, summary, score, data.shape), run.recipe.to_yaml(), json.dumps(summary, indent=1)
        made._texts = dict(zip(TEXTS, texts, strict=True))
        return made

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Returns the card of the run, or of a network that was loaded, the one that came with it."""
        return ModelCard(self._texts["README.md"]) if "README.md" in self._texts else super().generate_model_card()

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Network:
        made = super()._from_pretrained(model_id=model_id, **options)
        where = {key: options[key] for key in options.keys() - inspect.signature(cls).parameters.keys()}
        for name in TEXTS:
            with contextlib.suppress(FileNotFoundError):
                path = repository_file(model_id, name, **where)
                made._texts[name] = files.read(path).decode(errors="replace")
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        for name, text in self._texts.items():
            files.replace(save_directory / name, text)

    def _stored(self) -> nn.Module:
        return self.network
