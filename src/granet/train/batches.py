"""An epoch's batches, a function of nothing but (seed, epoch, batch).

Images in memory are uint8 tensors on the training device; cropping, flipping and cutout are batched tensor operations
there, without worker processes. Images in a folder are decoded by workers as the epoch goes.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

NARROW = 100  # sides of an image, the longer to the shorter
IMAGE_SIZE, RESIZED = 224, 256  # ImageNet's crop, and the shorter side that the evaluation crop is cut from


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 `(n, C, H, W)` and labels int64 `(n,)`, in memory."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Split":
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> "Split":
        """Returns the split on `device` (itself if it is there)."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files, decoded when they are needed, and their labels int64 `(n,)`."""

    files: np.ndarray  # of str
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "FolderSplit":
        return FolderSplit(self.files[rows.numpy()], self.labels[rows])

    def to(self, device: torch.device | str) -> "FolderSplit":
        """Returns itself: files stay where they are, batches are decoded on the processor and moved."""
        return self


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images are varied: shift by up to `crop` pixels, mirror, cut out a square.

    Raises:
        ValueError: A size is negative or the padding unknown.
    """

    crop: int = 0  # pixels of padding on each side, of which an image-sized window is cut at random
    padding: Literal["reflect", "zeros"] = "reflect"
    flip: bool = False  # mirror left and right, half of the time
    cutout: int = 0  # side, in pixels, of a square set to the mean colour (DeVries & Taylor 2017)

    def __post_init__(self):
        if self.crop < 0 or self.cutout < 0:
            raise ValueError(f"crop and cutout are pixels, 0 or more; got crop={self.crop}, cutout={self.cutout}")
        if self.padding not in ("reflect", "zeros"):
            raise ValueError(f"padding is 'reflect' or 'zeros'; got {self.padding!r}")


def steps_per_epoch(samples: int, batch_size: int, *, world: int = 1, drop_last: bool = False) -> int:
    """Returns how many batches `epoch_batches` gives each rank when it trains."""
    full, rest = divmod(samples, batch_size * world)
    return full + (not drop_last and rest >= world)


def epoch_batches(
    split: Split | FolderSplit,
    *,
    batch_size: int,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    epoch: int = 0,
    augment: Augment = Augment(),
    device: torch.device | str = "cpu",
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns the batches of an epoch: x float32 `(n, C, H, W)` normalised, y int64 `(n,)`, both on `device`.

    Batch `i` is the same whatever `start` is, so a run can go on from any batch without stored random state.
    With `train` the order is shuffled and `augment` applied. Hand over `split.to(device)`, kept for the whole
    run, or the images are moved there every epoch.

    Args:
        batch_size: Images a batch, of each rank.
        start: The first batch to give.
        rank: Every `world` images go one to each rank; a last batch of fewer than `world` is left out in training.
        drop_last: Leave out a last batch that is not full.
        workers: Processes that decode a `FolderSplit`; by default one a core, at most 16.

    Raises:
        ValueError: A number is out of range, or `augment` asks for what the split cannot do.
    """
    if batch_size < 1 or start < 0 or not 0 <= rank < world:
        raise ValueError(
            f"need batch_size >= 1, start >= 0, 0 <= rank < world; got {batch_size=} {start=} {rank=} {world=}"
        )
    rng = np.random.default_rng([seed, 1, epoch])
    order = rng.permutation(len(split)) if train else np.arange(len(split))
    chunk = batch_size * world
    smallest = chunk if drop_last else world if train else rank + 1
    firsts = [first for first in range(0, len(split), chunk) if len(split) - first >= smallest][start:]
    # where this rank's images stand in the epoch's order
    places = [slice(first + rank, min(first + chunk, len(split)), world) for first in firsts]
    if isinstance(split, FolderSplit):
        if train and augment.crop:
            raise ValueError("an image folder is cropped by random resizing: leave Augment.crop at 0")
        decoder = _Decoder(split.files, train, augment.flip, (seed, 2, epoch))
        fetch, size = _decoded(decoder, order, places, workers), (IMAGE_SIZE, IMAGE_SIZE)
    else:
        split, fetch, size = split.to(device), None, tuple(split.images.shape[2:])
        if train and augment.padding == "reflect" and augment.crop >= min(size):
            raise ValueError(f"crop={augment.crop} cannot be reflected in images of {size[0]}x{size[1]} pixels")
    shifts = 2 * augment.crop + 1
    draws = rng.integers(0, [shifts, shifts, 2, *size], size=(len(split), 5)) if train else None
    return _batches(split, fetch, order, places, draws, augment, mean, std, device)


def _batches(split, fetch, order, places, draws, augment, mean, std, device):
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device)[:, None, None])
    shift = -255 * torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None] * scale
    # all that is random goes to the device once an epoch, so that no batch waits for the processor
    order = torch.from_numpy(order).to(split.labels.device)
    draws = None if draws is None else torch.from_numpy(draws).to(device)
    for place in places:
        y = split.labels[order[place]].to(device)
        if fetch is not None:
            x = next(fetch).to(device, non_blocking=True)
        elif draws is not None:
            x = _shifted(split.images[order[place]], draws[place], augment)
        else:
            x = split.images[order[place]]
        x = x.to(torch.float32).mul_(scale).add_(shift)
        if draws is not None and augment.cutout:
            x = _cut_out(x, draws[place], augment.cutout)
        yield x, y


def _shifted(x: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Returns images cropped and mirrored: one gather, whose indices hold both."""
    if not augment.crop and not augment.flip:
        return x
    n, channels, height, width = x.shape
    top, left, mirrored = draws[:, :3, None].unbind(1)
    rows = torch.arange(height, device=x.device) + top - augment.crop
    columns = torch.arange(width, device=x.device) + left - augment.crop
    if augment.flip:
        columns = torch.where(mirrored.bool(), columns.flip(1), columns)
    outside = None
    if augment.crop and augment.padding == "zeros":
        outside = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    elif augment.crop:
        rows = height - 1 - (height - 1 - rows.abs()).abs()
        columns = width - 1 - (width - 1 - columns.abs()).abs()
    index = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
    x = x.flatten(2).gather(2, index).view(n, channels, height, width)
    return x if outside is None else x.masked_fill_(outside[:, None], 0)


def _cut_out(x: Tensor, draws: Tensor, side: int) -> Tensor:
    """Returns normalised images with a square of zeros each, the mean colour; at the border it is cut off."""
    top, left = draws[:, 3:, None].unbind(1)
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
    inside_rows = (rows >= top - side // 2) & (rows < top - side // 2 + side)
    inside_columns = (columns >= left - side // 2) & (columns < left - side // 2 + side)
    return x.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0)


@dataclass(frozen=True)
class _Decoder:
    """Image files by their position in an epoch, as the workers of a DataLoader take them."""

    files: np.ndarray
    train: bool
    flip: bool
    seed: tuple[int, ...]

    def __getitem__(self, position_and_row: tuple[int, int]) -> Tensor:
        from PIL import Image

        position, row = position_and_row
        try:
            with Image.open(self.files[row]) as file:
                if max(file.size) > NARROW * min(file.size):  # scaled up by its shorter side it would be huge
                    raise ValueError(f"{file.width}x{file.height} pixels, one side {NARROW} times the other")
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.files[row]} is no readable image: {error}") from error
        if self.train:
            rng = np.random.default_rng([*self.seed, position])
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=_random_box(*image.size, rng))
            if self.flip and rng.integers(2):
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            ratio = RESIZED / min(image.size)
            width, height = round(image.width * ratio), round(image.height * ratio)
            left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns a random part of an image: 8 to 100 % of its area, sides 3:4 to 4:3 (Szegedy et al. 2015)."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _decoded(decoder: _Decoder, order: np.ndarray, places: list[slice], workers: int | None) -> Iterator[Tensor]:
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError('an image folder needs pillow: pip install "granet[images]"')
    positions = range(len(order))
    loader = torch.utils.data.DataLoader(
        decoder,
        batch_sampler=[[(position, int(order[position])) for position in positions[place]] for place in places],
        num_workers=min(os.cpu_count() or 1, 16) if workers is None else workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
