"""The hyper-parameters of linear and convolution layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The hyper-parameters of one layer. Linear and one-dimensional layers are special cases of Conv2d."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns height and width of the output. Raises ValueError if the kernel does not fit an input of `size`."""
        out = []
        for i in range(2):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            out.append((size[i] + 2 * self.padding[i] - reach) // self.stride[i] + 1)
        if min(out) < 1:
            raise ValueError(f"a kernel of {self.kernel} with padding {self.padding} does not fit an input of {size}")
        return out[0], out[1]

    @property
    def numbers(self) -> list[int]:
        """The spec as the list of integers that an operator takes; `from_numbers` reads it back."""
        sizes = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        return [self.in_channels, self.out_channels, *sizes, self.groups]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> Spec:
        """Returns the spec whose `numbers` are given."""
        pairs = {
            key: (numbers[i], numbers[i + 1])
            for i, key in ((2, "kernel"), (4, "stride"), (6, "padding"), (8, "dilation"))
        }
        return cls(in_channels=numbers[0], out_channels=numbers[1], groups=numbers[10], **pairs)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """The shape of the weight as a Conv2d stores it."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)


def layer_spec(module: nn.Module) -> Spec:
    """Returns the spec of a Linear, Conv1d or Conv2d. Raises ValueError with the reason for any other module."""
    if isinstance(module, nn.Linear):
        return Spec(in_channels=module.in_features, out_channels=module.out_features)
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        raise ValueError(f"a {type(module).__name__} is none of Linear, Conv1d, Conv2d")
    if module.padding_mode != "zeros":
        raise ValueError(f"padding mode {module.padding_mode!r} is not zeros")
    padding = module.padding
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError("padding 'same' with an even kernel pads unevenly")
        padding = tuple(t // 2 for t in total)

    def pair(numbers: tuple[int, ...], filler: int) -> tuple[int, int]:
        return (filler, *numbers) if len(numbers) == 1 else (numbers[0], numbers[1])

    return Spec(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=pair(module.kernel_size, 1),
        stride=pair(module.stride, 1),
        padding=pair(padding, 0),
        dilation=pair(module.dilation, 1),
        groups=module.groups,
    )
