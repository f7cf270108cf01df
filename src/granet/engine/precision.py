"""Numbers at reduced precision: how activations are represented, and sparse weights packed into 32-bit words.

A word holds consecutive channels: one in float32, two in bfloat16, four in int8 (see csrc/reduced.h). Activations in
int8 are unsigned bytes with one scale and zero point per tensor; weights are signed bytes with one scale per output
channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from granet.engine.encoding import PRECISIONS
from granet.engine.geometry import Geometry
from granet.engine.spec import Spec

CHANNELS = {"float32": 1, "bfloat16": 2, "int8": 4}  # in a word
LEAST = 1e-30  # largest weight of an output channel below which all of them become 0; 127 / LEAST is finite


@dataclass(frozen=True)
class Format:
    """How the numbers of a value are represented. An int8 byte b stands for (b - zero) * scale."""

    precision: str = "float32"
    scale: float = 1.0
    zero: int = 0

    @property
    def channels(self) -> int:
        """The channels in a word."""
        return CHANNELS[self.precision]

    @property
    def number(self) -> int:
        """The number of the precision in an encoded program."""
        return PRECISIONS[self.precision]


FLOAT32 = Format()
BFLOAT16 = Format("bfloat16")


def int8_format(low: float, high: float) -> Format:
    """Returns the format whose bytes cover the numbers from `low` to `high`, and zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return Format("int8", scale, max(0, min(255, round(-low / scale))))


def weight_scale(weight: Tensor) -> Tensor:
    """Returns the scale of each output channel (the first axis), with which its largest weight becomes 127 or -127."""
    return weight.flatten(1).abs().amax(dim=1).clamp_min(LEAST) / 127


def quantised_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weight in signed bytes, from -127 to 127, and the scale of each output channel."""
    scale = weight_scale(weight)
    return (weight.flatten(1) / scale[:, None]).round().to(torch.int8).view_as(weight), scale


@dataclass(frozen=True)
class WordStructure:
    """A sparse matrix of words in compressed rows; see WordRows in csrc/reduced.h. All tensors are int32.

    Attributes:
        ptr: the position of each stored row's first word, and the end of the last row.
        id: the output word plane of each group of rows.
        offset: for each word, the words from a tile's first input position to the one it reads.
        value: the words.
        chunks: the number of parts that threads may compute separately.
    """

    ptr: Tensor
    id: Tensor
    offset: Tensor
    value: Tensor
    chunks: int

    @property
    def groups(self) -> int:
        """The number of groups of rows."""
        return self.id.numel()


def word_structure(weight: Tensor, spec: Spec, geometry: Geometry, chunks: int) -> WordStructure:
    """Returns the words of a weight in bfloat16 or signed bytes: one where any of a word's channels is not zero.

    Args:
        weight: the weight, of shape (out_channels, channels of a group, rows, columns of the kernel).
        spec: the layer.
        geometry: the geometry of the layer's activations, in words.
        chunks: the number of parts that threads may compute separately; it divides the number of groups of rows.
    """
    per_word = 4 if weight.dtype == torch.int8 else 2
    taps, per_group = spec.kernel[0] * spec.kernel[1], spec.in_channels // spec.groups
    planes = -(-spec.in_channels // per_word)
    row, channel, tap = weight.reshape(-1, per_group, taps).nonzero(as_tuple=True)
    found = weight.reshape(-1, per_group, taps)[row, channel, tap]
    bits = found.view(torch.uint8) if per_word == 4 else found.view(torch.int16)
    bits = bits.long() & (0xFF if per_word == 4 else 0xFFFF)
    channel = channel + row // (spec.out_channels // spec.groups) * per_group
    key, where = ((row * planes + channel // per_word) * taps + tap).unique(return_inverse=True)
    value = torch.zeros(key.numel(), dtype=torch.int64)
    value.index_add_(0, where, bits << (channel % per_word * (32 // per_word)))
    value = torch.where(value >= 2**31, value - 2**32, value).int()
    row, plane, tap = key // (planes * taps), key // taps % planes, key % taps
    phase, shift = (torch.tensor(numbers)[tap] for numbers in zip(*geometry.taps, strict=True))
    offset = (plane * len(geometry.phases) + phase) * geometry.plane + shift

    groups = -(-spec.out_channels // per_word)
    length = torch.bincount(row, minlength=groups * per_word)
    begin = length.cumsum(0) - length
    group = torch.arange(groups).view(-1, chunks).t()  # chunk c holds the groups c, c + chunks, ...
    order = length.view(groups, per_word).sum(dim=1)[group].argsort(dim=1, stable=True)
    group = group.gather(1, order).reshape(-1)
    stored = (group[:, None] * per_word + torch.arange(per_word)).reshape(-1)
    ptr = torch.zeros(stored.numel() + 1, dtype=torch.int64)
    torch.cumsum(length[stored], 0, out=ptr[1:])
    source = torch.repeat_interleave(begin[stored] - ptr[:-1], length[stored]) + torch.arange(key.numel())
    return WordStructure(ptr.int(), group.int(), offset[source].int(), value[source].contiguous(), chunks)
