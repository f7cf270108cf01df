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
import importlib.util
import io
import math
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from granet.names import unknown
from granet.train.batches import IMAGE_SIZE, Augment, FolderSplit, Split, epoch_batches, steps_per_epoch

__all__ = ["DATA", "Augment", "Dataset", "FolderSplit", "Source", "Split", "epoch_batches", "load", "steps_per_epoch"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


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


@dataclass(frozen=True)
class Source:
    """What is known of a dataset before it is read, and how to find and read it."""

    description: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    find: Callable[[Path], Path | None]
    read: Callable[[Path], tuple[Split | FolderSplit, Split | FolderSplit]]  # the official training and test sets
    advice: str  # what to download, and where to put it; {root} is the data folder

    def locate(self, root: str | Path | None = None) -> Path | None:
        """Return where the dataset is on this machine, or None."""
        return self.find(data_root(root))


def data_root(root: str | Path | None = None) -> Path:
    """Return the data folder: `root`, else the environment's `GRANET_DATA`, else `./data`."""
    return Path(root or os.environ.get("GRANET_DATA") or "data").expanduser().absolute()


def load(name: str, *, root: str | Path | None = None, validation: int | float, seed: int = 0) -> Dataset:
    """Return the dataset `name`, with `validation` images (or that share) held out of its training set.

    The held-out images are drawn by `seed`, each class in proportion; the test set is the official one.

    Raises:
        ValueError: Unknown name; `validation` does not fit; a file is damaged (it is named).
        FileNotFoundError: The dataset is not here; the message says what to download and where to put it.
    """
    if name not in DATA:
        raise ValueError(unknown("dataset", name, DATA))
    source = DATA[name]
    place = source.locate(root)
    if place is None:
        raise FileNotFoundError(f"{name} is not on this machine. {source.advice.format(root=data_root(root))}")
    train, test = source.read(place)
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
    return Dataset(name, train[kept], train[held], test, classes, source.shape, source.mean, source.std)


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to keep and the `count` rows to hold out, ascending; each class gives its share of them."""
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


def _find_sklearn(root: Path) -> Path | None:
    spec = importlib.util.find_spec("sklearn")
    return Path(spec.origin).parent if spec and spec.origin else None


def _find_folder(name: str, root: Path, *, holding: str) -> Path | None:
    """Return the data folder's folder `name`, or the data folder itself, whichever has the entry `holding`."""
    return next((place for place in (root / name, root) if (place / holding).exists()), None)


def _find_fashion_mnist(root: Path) -> Path | None:
    places = (root / "fashion-mnist", root / "FashionMNIST" / "raw", root, DEBIAN_FASHION_MNIST)
    return next((place for place in places if any(place.glob("t10k-images-idx3-ubyte*"))), None)


def _read_digits(place: Path) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # 17 levels of grey
    labels = torch.from_numpy(digits.target.astype(np.int64))
    everything = Split(images, labels)
    # scikit-learn names no test set: ours is a fixed fifth, whatever the seed of the run
    kept, held = stratified(labels, 360, seed=0)
    return everything[kept], everything[held]


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array uint8 of an IDX file, plain or gzipped: magic number, sizes, bytes.

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


def _read_fashion_mnist(folder: Path) -> tuple[Split, Split]:
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


def _read_imagenet(folder: Path) -> tuple[FolderSplit, FolderSplit]:
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


def _cifar(classes: int, megabytes: int, mean: tuple[float, ...], std: tuple[float, ...], **files) -> Source:
    folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
    return Source(
        description=f"60,000 colour photographs of {classes} kinds of things, 32x32 pixels",
        classes=classes,
        shape=(3, 32, 32),
        mean=mean,
        std=std,
        find=partial(_find_folder, folder, holding=files["test"]),
        read=partial(_read_cifar, classes=classes, **files),
        advice=f"Download https://www.cs.toronto.edu/~kriz/cifar-{classes}-python.tar.gz ({megabytes} MB) and unpack "
        f"it in {{root}}, so that {{root}}/{folder}/{files['test']} exists.",
    )


DATA: dict[str, Source] = {
    "digits": Source(
        description="1,797 handwritten digits, 8x8 grey pixels; ships inside scikit-learn",
        classes=10,
        shape=(1, 8, 8),
        mean=(0.3053,),
        std=(0.3760,),
        find=_find_sklearn,
        read=_read_digits,
        advice='It ships inside scikit-learn: pip install "granet[train]".',
    ),
    "fashion-mnist": Source(
        description="70,000 pictures of 10 kinds of clothes, 28x28 grey pixels",
        classes=10,
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        find=_find_fashion_mnist,
        read=_read_fashion_mnist,
        advice="Install Debian's package (apt-get install dataset-fashion-mnist), or download the four "
        "*-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist into {root}/fashion-mnist.",
    ),
    "cifar10": _cifar(
        10,
        163,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        key=b"labels",
    ),
    "cifar100": _cifar(
        100,
        161,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        train=("train",),
        test="test",
        key=b"fine_labels",
    ),
    "imagenet": Source(
        description="an image folder, ImageNet's 1.28 million photographs of 1,000 classes, cut to 224x224 pixels",
        classes=1000,
        shape=(3, IMAGE_SIZE, IMAGE_SIZE),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        find=partial(_find_folder, "imagenet", holding="train"),
        read=_read_imagenet,
        advice="Download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (https://image-net.org, free account) and "
        "unpack them to {root}/imagenet/train/<class>/*.JPEG and {root}/imagenet/val/<class>/*.JPEG.",
    ),
}
