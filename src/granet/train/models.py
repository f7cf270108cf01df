"""Networks for the recipes: small ones for minutes on two cores, and those of the sparse-training literature.

Weights are drawn from torch's global generator: seed it to repeat them.

>>> model = build("resnet20", classes=10, in_channels=3)
>>> sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
270896
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, fx, nn

from granet.train.catalog import MODELS as MODELS


def build(name: str, *, classes: int, in_channels: int) -> nn.Module:
    """Returns a new network of the architecture `name`, one of `granet.train.catalog.MODELS`.

    Args:
        name: of the architecture.
        classes: number of outputs.
        in_channels: channels of the images.

    Raises:
        ValueError: there is no architecture of that name; the message lists those there are.
    """
    return MODELS[name](classes, in_channels)


class Residual(nn.Module):
    """A body beside a shortcut, added and rectified (He et al. 2016)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Returns ReLU(body(x) + shortcut(x))."""
        return F.relu(self.body(x) + self.shortcut(x))


def _conv(n_in: int, n_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Returns a convolution that keeps the image's size (over the stride), and its batch norm."""
    return [nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(n_out)]


def _residual(n_in: int, n_out: int, stride: int, *body: nn.Module) -> Residual:
    same = n_in == n_out and stride == 1
    return Residual(nn.Sequential(*body), nn.Identity() if same else nn.Sequential(*_conv(n_in, n_out, 1, stride)))


def _basic(n_in: int, width: int, stride: int) -> Residual:
    return _residual(n_in, width, stride, *_conv(n_in, width, 3, stride), nn.ReLU(), *_conv(width, width, 3))


def _bottleneck(n_in: int, width: int, stride: int) -> Residual:
    # "v1.5": the 3x3 convolution has the stride, not the first 1x1
    body = (*_conv(n_in, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, 4 * width, 1))
    return _residual(n_in, 4 * width, stride, *body)


def _initialised(network: nn.Module, *, mode: str, linear: Callable[[nn.Linear], object] | None) -> nn.Module:
    """Returns the network with Kaiming-normal convolutions; `linear` None leaves linear layers as torch makes them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear:
            linear(module)
    return network


def _kaiming(linear: nn.Linear) -> None:
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # the bias as torch makes it


def _small(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


def _resnet(
    classes: int,
    in_channels: int,
    *,
    block: Callable[[int, int, int], Residual],
    depths: tuple[int, ...],
    width: int = 64,
    small: bool = True,
    bias: bool = True,
    kaiming: bool = True,
    linear: Callable[[nn.Linear], object] | None = None,
) -> nn.Module:
    """Returns a residual network; each stage after the first doubles the width and halves the image.

    Its stem is one 3x3 convolution, or, if not `small`, a 7x7 one and a pooling, which shrink images to a quarter.
    Without `kaiming` all layers are initialised as torch does by itself.
    """
    stem = [*_conv(in_channels, width, 3), nn.ReLU()]
    if not small:
        stem = [*_conv(in_channels, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    parts, channels = OrderedDict(stem=nn.Sequential(*stem)), width
    expansion = 4 if block is _bottleneck else 1
    for stage, depth in enumerate(depths):
        blocks = []
        for i in range(depth):
            blocks.append(block(channels, width << stage, 2 if stage and i == 0 else 1))
            channels = expansion * width << stage
        parts[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, classes, bias=bias)}
    network = nn.Sequential(parts)
    return _initialised(network, mode="fan_in", linear=linear) if kaiming else network


def _vgg(classes: int, in_channels: int, *, depths: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    """Returns stages of 3x3 convolutions with a pooling between them, an average, and one linear layer."""
    layers, channels = [], in_channels
    for depth, width in zip(depths, widths, strict=True):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            layers += [*_conv(channels, width, 3), nn.ReLU()]
            channels = width
    parts = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(channels, classes)}
    network = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), **parts))
    return _initialised(network, mode="fan_out", linear=_small)


def digits_cnn(classes: int, in_channels: int) -> nn.Module:
    """Returns three convolutions and two linear layers for images of 8x8 pixels."""
    features = nn.Sequential(
        *_conv(in_channels, 32, 3), nn.ReLU(), *_conv(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        *_conv(64, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes))
    return nn.Sequential(OrderedDict(features=features, head=head))


def fashion_cnn(classes: int, in_channels: int) -> nn.Module:
    """Returns three convolutions and two linear layers for images of 28x28 pixels."""
    # strides rather than poolings: most of the time of a poorer processor goes to the early, large images
    features = nn.Sequential(
        *_conv(in_channels, 16, 3, 2), nn.ReLU(), *_conv(16, 32, 3, 2), nn.ReLU(),
        *_conv(32, 64, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.Flatten(),
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(576, 384), nn.ReLU(), nn.Linear(384, classes))
    return nn.Sequential(OrderedDict(features=features, head=head))


def mlp(classes: int, in_channels: int) -> nn.Module:
    """Returns LeNet-300-100: three linear layers for images of 28x28 pixels, to which others are resampled."""
    layers = [nn.Linear(784 * in_channels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes)]
    return nn.Sequential(_Resized(28), nn.Flatten(), *layers)


class _Resized(nn.AdaptiveAvgPool2d):
    """Pooling to a size. Images that have it already pass as they are: pooling them would take longer than the rest."""

    def forward(self, x: Tensor) -> Tensor:
        return _resized(x, self.output_size)


@fx.wrap  # which branch is taken is not for a trace to fix
def _resized(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-2:] == (size, size) else F.adaptive_avg_pool2d(x, size)


resnet20 = partial(_resnet, block=_basic, depths=(3, 3, 3), width=16, linear=_kaiming)
vgg19 = partial(_vgg, depths=(2, 2, 4, 4, 4), widths=(64, 128, 256, 512, 512))
resnet18_cifar = partial(_resnet, block=_basic, depths=(2, 2, 2, 2))
resnet50_cifar = partial(_resnet, block=_bottleneck, depths=(3, 4, 6, 3), bias=False, kaiming=False)
resnet18 = partial(resnet18_cifar, small=False)
resnet50 = partial(_resnet, block=_bottleneck, depths=(3, 4, 6, 3), small=False)
