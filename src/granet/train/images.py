"""The images that a training reads: the three splits on this rank's device, and their batches."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from granet import ranks
from granet.shards import checksum
from granet.train import data
from granet.train.recipe import Recipe

Batches = Iterator[tuple[Tensor, Tensor]]


class Images:
    """The images of a recipe. Of several ranks each has all images and reads its share of every batch.

    Args:
        recipe: what to train, on what, how.
        here: this rank.
        device: where the batches are to be.

    Raises:
        ValueError: the recipe and the data do not fit each other.
        FileNotFoundError: the dataset is not there; the message says where to get it.
    """

    def __init__(self, recipe: Recipe, here: ranks.Ranks, device: torch.device):
        self._recipe, self._ranks, self._device = recipe, here, device
        self._drop_last = not recipe.train.partial_batch
        self._size = recipe.train.batch_size  # of a batch, on all ranks
        with here.guard():  # nodes differ in their disks
            self._share = here.share(recipe.train.batch_size, recipe.train.accumulate)  # of a batch, on this rank
            where = {"root": recipe.data.root, "validation": recipe.data.validation}
            self.dataset = data.load(recipe.data.name, seed=recipe.seed, **where)
            self.splits = {name: getattr(self.dataset, name).to(device) for name in ("train", "validation", "test")}
            seen = {name: (len(split), checksum(split.labels)) for name, split in self.splits.items()}
        here.same("the data (images and checksum of their labels)", seen)
        n = len(self.splits["train"])
        self.steps_per_epoch = data.steps_per_epoch(n, self._share, world=here.world, drop_last=self._drop_last)
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size {self._size} is larger than the training set, {n} images")

    def epoch_from(self, step: int) -> Batches:
        """Returns this rank's share of the batches after `step` optimizer steps, up to the end of their epoch."""
        epoch, start = divmod(step, self.steps_per_epoch)
        augment = {key: getattr(self._recipe.data, key) for key in ("crop", "padding", "flip", "cutout")}
        order = {"seed": self._recipe.seed, "epoch": epoch, "start": start, "drop_last": self._drop_last}
        order |= {"rank": self._ranks.rank, "world": self._ranks.world}
        return self._batches(
            self.splits["train"], batch_size=self._share, train=True, augment=data.Augment(**augment), **order
        )

    def first(self, batches: int) -> list[tuple[Tensor, Tensor]]:
        """Returns the first training batches, whole and without augmentation."""
        options = {"batch_size": self._size, "train": True, "augment": data.Augment()}
        options |= {"seed": self._recipe.seed, "epoch": 0, "start": 0, "drop_last": self._drop_last}
        return list(itertools.islice(self._batches(self.splits["train"], **options), batches))

    def once(self, split: str, count: int | None = None) -> Batches:
        """Returns this rank's share of a split, in batches, every image of it once, without augmentation.

        With a `count`, the images are so many, spread evenly over the split, or all if it has fewer.
        """
        mine = {"rank": self._ranks.rank, "world": self._ranks.world}
        return self._batches(self._some(split, count), batch_size=max(256, self._size), train=False, **mine)

    def spread(self, split: str, count: int) -> Batches:
        """Returns `count` images that are spread evenly over a split, or all if it has fewer, without augmentation."""
        return self._batches(self._some(split, count), batch_size=max(256, self._size), train=False)

    def _some(self, split: str, count: int | None) -> data.Split | data.FolderSplit:
        images = self.splits[split]
        if count is None or count >= len(images):
            return images
        return images[torch.linspace(0, len(images) - 1, count).long()]

    def trained_on(self, step: int) -> int:
        """Returns on how many examples the first `step` optimizer steps train, on all ranks together."""
        epochs, batches = divmod(step, self.steps_per_epoch)
        of_an_epoch = min(self.steps_per_epoch * self._size, len(self.splits["train"]))
        return epochs * of_an_epoch + batches * self._size

    def _batches(self, images: data.Split | data.FolderSplit, **options) -> Batches:
        options |= {"mean": self.dataset.mean, "std": self.dataset.std}
        options |= {"device": self._device, "workers": self._ranks.workers}
        return data.epoch_batches(images, **options)
