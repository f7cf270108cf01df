"""Datasets: the small ones as uint8 tensors in memory, ImageNet as a folder of files.

Nothing is downloaded, nothing untrusted is unpickled: a missing dataset raises an error that says what to put where.

>>> data = load("digits", validation=0.1)
>>> len(data.train), len(data.validation), len(data.test), data.shape
(1293, 144, 360, (1, 8, 8))
>>> x, y = next(epoch_batches(data.train, batch_size=32, train=True, mean=data.mean, std=data.std))
>>> x.shape, y.shape
(torch.Size([32, 1, 8, 8]), torch.Size([32]))
"""

import gzip
import io
import math
import os
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from granet.train.batches import Augment, FolderSplit, Split, epoch_batches, steps_per_epoch
from granet.train.catalog import DATASETS, Source, data_root

__all__ = [
    "DATASETS",
    "Augment",
    "Dataset",
    "FolderSplit",
    "Source",
    "Split",
    "epoch_batches",
    "load",
    "steps_per_epoch",
]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset's three splits; `mean` and `std` are per channel, of pixels in [0, 1]."""

    name: str
    train: Split | FolderSplit
    validation: Split | FolderSplit
    test: Split | FolderSplit
    classes: int
    shape: tuple[int, int, int]  # of one image: (C, H, W)
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str, *, root: str | Path | None = None, validation: int | float, seed: int = 0) -> Dataset:
    """Returns the dataset `name`, with `validation` images (or that share) held out of its training set.

    The held-out images are drawn by `seed`, each class in proportion; the test set is the official one.

    Raises:
        ValueError: there is no dataset of that name, `validation` does not fit, or a file, which is named, is damaged.
        FileNotFoundError: the dataset is not here; the message says what to download and where to put it.
    """
    source = DATASETS[name]
    place = source.locate(root)
    if place is None:
        raise FileNotFoundError(f"{name} is not on this machine. {source.advice.format(root=data_root(root))}")
    train, test = (_split(part, source, f"the {which} set of {name}") for part, which in _named(source.read(place)))
    count = validation if isinstance(validation, int) else round(validation * len(train))
    if (
        isinstance(validation, bool)
        or not 0 <= count < len(train)
        or (isinstance(validation, float) and validation > 1)
    ):
        raise ValueError(f"validation is a count below {len(train)} or a share below 1; got {validation!r}")
    if validation and not count:
        raise ValueError(f"validation={validation!r} of {len(train)} images is none: give a larger share, or a number")
    kept, held = stratified(train.labels, count, seed)
    # an image folder may hold a part of ImageNet's classes
    classes = int(train.labels.max()) + 1 if isinstance(train, FolderSplit) else source.classes
    mean, std = (source.mean, source.std) if source.mean and source.std else _statistics(train, name)
    return Dataset(name, train[kept], train[held], test, classes, source.shape, mean, std)


def _named(parts) -> list[tuple]:
    """Returns the training set and the test set with the words "training" and "test"."""
    return list(zip(parts, ("training", "test"), strict=True))


def _split(part, source: Source, what: str) -> Split | FolderSplit:
    """Returns a training or test set as it was read, as a split; `what` names it in errors.

    Raises:
        ValueError: images or labels are not what `Source` says.
    """
    if isinstance(part, FolderSplit):
        return part
    images, labels = (part.images, part.labels) if isinstance(part, Split) else map(torch.as_tensor, part)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != source.shape:
        given = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
        raise ValueError(
            f"{what} must have uint8 images of shape (n, {', '.join(map(str, source.shape))}), not {given}"
        )
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ValueError(f"{what} must have one whole number as label for each of its {len(images)} images")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < source.classes:
        raise ValueError(f"{what} must have labels from 0 to {source.classes - 1}")
    return Split(images, labels.long())


def _statistics(train: Split | FolderSplit, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel, of the training set's pixels in [0, 1]."""
    if isinstance(train, FolderSplit):
        raise ValueError(f"the dataset {name} is a folder of files: give its mean and std where it is registered")
    std, mean = torch.std_mean(train.images.double() / 255, dim=(0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.clamp(min=1e-6).tolist())


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the rows to keep and the `count` rows to hold out, ascending; each class gives its share of them."""
    labels = labels.numpy()
    sizes = np.bincount(labels)
    exact = sizes * count / max(len(labels), 1)
    take = np.floor(exact).astype(int)
    take[np.argsort(take - exact, kind="stable")[: count - take.sum()]] += 1  # largest remainders first
    rng = np.random.default_rng([seed, 0])
    held = np.zeros(len(labels), dtype=bool)
    for label, n in enumerate(take):
        held[rng.permutation(np.flatnonzero(labels == label))[:n]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def read_digits(place: Path) -> tuple[Split, Split]:
    """Returns the training and the test images of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # 17 levels of grey
    labels = torch.from_numpy(digits.target.astype(np.int64))
    everything = Split(images, labels)
    # scikit-learn names no test set: ours is a fixed fifth, whatever the seed of the run
    kept, held = stratified(labels, 360, seed=0)
    return everything[kept], everything[held]


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array uint8 of an IDX file, plain or gzipped: magic number, sizes, bytes.

    No more of the file is unpacked than an array of `shape` has at most: its first size may be less, the others not.
    """
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} lacks {name}.gz (or {name}): copy it there, it is one of four files")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = np.frombuffer(file.read(4 + 4 * len(shape)), dtype=">u1")
            if len(header) < 4 + 4 * len(shape) or tuple(header[:4]) != (0, 0, 8, len(shape)):  # 8: unsigned bytes
                raise ValueError(f"{path} is no IDX file of {len(shape)}-dimensional bytes: fetch it again")
            found = tuple(int(size) for size in header[4:].view(">u4"))
            if found[0] > shape[0] or found[1:] != shape[1:]:
                raise ValueError(f"{path} says it holds an array {found}, where {shape} is the most: fetch it again")
            size = math.prod(found)
            content = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"only {len(content):,}"
        raise ValueError(f"{path} should hold {size:,} bytes for an array {found}, but has {more}: fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(found)


def read_fashion_mnist(folder: Path) -> tuple[Split, Split]:
    """Returns the training and the test images of Fashion-MNIST, from the folder of its four IDX files."""

    def split(part):
        images = _read_idx(folder, f"{part}-images-idx3-ubyte", (60_000, 28, 28))
        labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", (60_000,))
        return _checked(images[:, None], labels, classes=10, path=folder / f"{part}-labels-idx1-ubyte")

    return split("train"), split("t10k")


def _checked(images: np.ndarray, labels, *, classes: int, path: Path) -> Split:
    labels = np.asarray(labels, dtype=np.int64)
    if len(labels) != len(images) or (len(labels) and not 0 <= labels.min() <= labels.max() < classes):
        raise ValueError(f"{path}: {len(labels)} labels for {len(images)} images, or a label outside 0..{classes - 1}")
    return Split(torch.from_numpy(np.array(images)), torch.from_numpy(labels))


def _dtype(kind, *_) -> np.dtype:
    if kind not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of {kind!r}, not of bytes")
    return np.dtype(np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and uint8 arrays; refuses every other name before it is imported."""

    @staticmethod
    def _reconstruct(*_) -> np.ndarray:
        """An empty array to be filled; how large it says it is does not matter yet."""
        return np.empty(0, dtype=np.uint8)

    allowed = {  # noqa: RUF012 (nobody writes to it)
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): None,  # only ever named, never called
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),  # bytes in protocol 2 of Python 3
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return self.allowed[module, name]


LARGEST = 200_000_000  # bytes of a file of CIFAR's, the largest of which has 154 million
_TOO_MUCH = (MemoryError, OverflowError, RecursionError)  # what a pickle may ask for


def _read_cifar_file(path: Path, *, key: bytes, classes: int) -> Split:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: unpack the official archive again")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32), batch[key]
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, *_TOO_MUCH) as error:
        raise ValueError(
            f"{path} is no intact file of the CIFAR python archive ({error!r}): unpack it again"
        ) from error
    return _checked(images, labels, classes=classes, path=path)


def _read_cifar(folder: Path, *, train: tuple[str, ...], test: str, key: bytes, classes: int) -> tuple[Split, Split]:
    parts = [_read_cifar_file(folder / name, key=key, classes=classes) for name in train]
    joined = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    return joined, _read_cifar_file(folder / test, key=key, classes=classes)


def read_cifar10(folder: Path) -> tuple[Split, Split]:
    """Returns the training and the test images of CIFAR-10, from the folder of its Python archive."""
    train = tuple(f"data_batch_{i}" for i in range(1, 6))
    return _read_cifar(folder, train=train, test="test_batch", key=b"labels", classes=10)


def read_cifar100(folder: Path) -> tuple[Split, Split]:
    """Returns the training and the test images of CIFAR-100, from the folder of its Python archive."""
    return _read_cifar(folder, train=("train",), test="test", key=b"fine_labels", classes=100)


def read_imagenet(folder: Path) -> tuple[FolderSplit, FolderSplit]:
    """Returns the training and the validation images of an image folder as files that are decoded when needed."""
    names = sorted(place.name for place in (folder / "train").iterdir() if place.is_dir())

    def split(part):
        missing = [name for name in names if not (folder / part / name).is_dir()]
        if missing or not names:
            raise FileNotFoundError(f"{folder / part} must hold one folder of images a class; missing: {missing[:3]}")
        found = [
            (entry.path, label)
            for label, name in enumerate(names)
            for entry in sorted(os.scandir(folder / part / name), key=lambda entry: entry.name)
            if entry.name.lower().endswith((".jpeg", ".jpg", ".png"))
        ]
        if not found:
            raise FileNotFoundError(f"{folder / part} holds no images: it needs {part}/<class>/*.JPEG")
        return FolderSplit(np.array([path for path, _ in found]), torch.tensor([label for _, label in found]))

    return split("train"), split("val")
