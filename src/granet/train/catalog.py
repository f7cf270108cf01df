"""The registries of models, datasets and optimizers, with the built-in ones, free of torch.

An entry says what is known of a thing before it is built, and has a function that builds it. For what comes with granet
this function is named by a text (`Imported`), so that a recipe is checked without importing torch.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granet.registry import Registry

if TYPE_CHECKING:
    from torch import nn

HERE = "granet.train.catalog"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Imported:
    """A function named by a text, `"module:function"`, whose module is imported when it is first called."""

    where: str

    def __call__(self, *args, **kwargs) -> Any:
        """Returns what the function returns."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(module), name)(*args, **kwargs)


@dataclass(frozen=True)
class Architecture:
    """A way to build a network, and a line about it."""

    description: str
    build: Callable[[int, int], "nn.Module"]

    def __call__(self, classes: int, in_channels: int) -> "nn.Module":
        """Returns a new network that tells `classes` classes apart, for images of `in_channels` channels."""
        return self.build(classes, in_channels)


@dataclass(frozen=True)
class OptimizerKind:
    """A way to build an optimizer, and a line about it.

    `build(groups, settings)` gets parameter groups, in which `weight_decay` is set, and the section `train` of a
    recipe; it returns a `torch.optim.Optimizer`.
    """

    description: str
    build: Callable[..., Any]


@dataclass(frozen=True)
class Source:
    """What is known of a dataset before it is read, and how to find and read it.

    `mean` and `std` are those of the training images, one number for each channel, of pixels in [0, 1]; None has them
    computed when the dataset is loaded.
    """

    description: str
    classes: int
    shape: tuple[int, int, int]  # of one image: (C, H, W)
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    find: Callable[[Path], Path | None]  # where in the data folder the dataset is, or None
    read: Callable[[Path], tuple[Any, Any]]  # the official training and test sets, from there
    advice: str  # what to download, and where to put it; {root} is the data folder

    def locate(self, root: str | Path | None = None) -> Path | None:
        """Returns where the dataset is on this machine, or None."""
        return self.find(data_root(root))


def data_root(root: str | Path | None = None) -> Path:
    """Returns the data folder: `root`, else the environment's `GRANET_DATA`, else `./data`."""
    return Path(root or os.environ.get("GRANET_DATA") or "data").expanduser().absolute()


MODELS: Registry[Architecture] = Registry("model", home=HERE)
DATASETS: Registry[Source] = Registry("dataset", home=HERE)
OPTIMIZERS: Registry[OptimizerKind] = Registry("optimizer", home=HERE)


def _find_sklearn(root: Path) -> Path | None:
    spec = importlib.util.find_spec("sklearn")
    return Path(spec.origin).parent if spec and spec.origin else None


def _find_folder(name: str, root: Path, *, holding: str) -> Path | None:
    """Returns the data folder's folder `name`, or the data folder itself, whichever has the entry `holding`."""
    return next((place for place in (root / name, root) if (place / holding).exists()), None)


def _find_fashion_mnist(root: Path) -> Path | None:
    places = (root / "fashion-mnist", root / "FashionMNIST" / "raw", root, DEBIAN_FASHION_MNIST)
    return next((place for place in places if any(place.glob("t10k-images-idx3-ubyte*"))), None)


def _cifar(
    classes: int, megabytes: int, *, test: str, mean: tuple[float, ...], std: tuple[float, ...], read: Imported
) -> Source:
    folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
    return Source(
        description=f"60,000 colour photographs of {classes} kinds of things, 32x32 pixels",
        classes=classes,
        shape=(3, 32, 32),
        mean=mean,
        std=std,
        find=partial(_find_folder, folder, holding=test),
        read=read,
        advice=f"Download https://www.cs.toronto.edu/~kriz/cifar-{classes}-python.tar.gz ({megabytes} MB) and unpack "
        f"it in {{root}}, so that {{root}}/{folder}/{test} exists.",
    )


DATASETS.add("digits")(
    Source(
        description="1,797 handwritten digits, 8x8 grey pixels; ships inside scikit-learn",
        classes=10,
        shape=(1, 8, 8),
        mean=(0.3053,),
        std=(0.3760,),
        find=_find_sklearn,
        read=Imported("granet.train.data:read_digits"),
        advice='It ships inside scikit-learn: pip install "granet[train]".',
    )
)
DATASETS.add("fashion-mnist")(
    Source(
        description="70,000 pictures of 10 kinds of clothes, 28x28 grey pixels",
        classes=10,
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        find=_find_fashion_mnist,
        read=Imported("granet.train.data:read_fashion_mnist"),
        advice="Install Debian's package (apt-get install dataset-fashion-mnist), or download the four "
        "*-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist into {root}/fashion-mnist.",
    )
)
DATASETS.add("cifar10")(
    _cifar(
        10,
        163,
        test="test_batch",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        read=Imported("granet.train.data:read_cifar10"),
    )
)
DATASETS.add("cifar100")(
    _cifar(
        100,
        161,
        test="test",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        read=Imported("granet.train.data:read_cifar100"),
    )
)
DATASETS.add("imagenet")(
    Source(
        description="an image folder, ImageNet's 1.28 million photographs of 1,000 classes, cut to 224x224 pixels",
        classes=1000,
        shape=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        find=partial(_find_folder, "imagenet", holding="train"),
        read=Imported("granet.train.data:read_imagenet"),
        advice="Download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (https://image-net.org, free account) and "
        "unpack them to {root}/imagenet/train/<class>/*.JPEG and {root}/imagenet/val/<class>/*.JPEG.",
    )
)

for _name, _description in {
    "digits-cnn": "three convolutions and two linear layers for 8x8 pixels; 73 thousand weights",
    "fashion-cnn": "three convolutions and two linear layers for 28x28 pixels; 0.25 million weights",
    "mlp": "LeNet-300-100 for 28x28 pixels (others are resampled); 0.27 million weights",
    "resnet20": "ResNet-20 for 32x32 pixels, 16 to 64 filters, 1x1 convolutions as shortcuts; 0.27 million weights",
    "vgg19": "VGG-19 for 32x32 pixels, with batch norm and one linear layer; 20 million weights",
    "resnet18-cifar": "ResNet-18 for 32x32 pixels; 11 million weights",
    "resnet50-cifar": "ResNet-50 for 32x32 pixels; 24 million weights",
    "resnet18": "ResNet-18 for 224x224 pixels; 12 million weights",
    "resnet50": "ResNet-50 v1.5 for 224x224 pixels; 26 million weights",
}.items():
    _function = Imported(f"granet.train.models:{_name.replace('-', '_')}")
    MODELS.add(_name)(Architecture(_description, _function))

OPTIMIZERS.add("sgd")(
    OptimizerKind("stochastic gradient descent, with momentum", Imported("granet.train.optimizer:sgd"))
)
OPTIMIZERS.add("adamw")(OptimizerKind("Adam with decoupled weight decay", Imported("granet.train.optimizer:adamw")))
