"""The geometry of one layer for one input shape: how its activations lie in planes (see csrc/planes.h)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from granet.engine.spec import Spec

PANEL = 512  # positions of a pointwise layer that are packed at a time
LINE = 16  # floats in a cache line: plane starts are aligned to it, whatever the vector width
LINE_OF_HALVES = 32  # bfloat16 numbers in a cache line
FIRST_LEVEL = 24 * 1024  # bytes of activations a block of channels may occupy, of a 32 KiB first-level cache


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shapes and strides of a layer's planes. Lengths count the numbers in a plane unless stated otherwise.

    Attributes:
        images, channels, height, width: the input, NCHW (height = width = 1 for a linear layer).
        out_channels, out_height, out_width: the output.
        stride: rows and columns between two outputs.
        pitch: positions from the start of one row of a plane to the next, including the gap between them.
        batch: number of images that lie innermost in a plane.
        front: zeros before a plane's first position.
        plane: numbers from one plane to the next.
        tile: numbers of the output computed at a time.
        chunks: number of groups of rows that threads may compute separately.
        phases: the (row, column) phases of the input that are read.
        taps: (phase index, shift) for each position of the kernel, row by row.
        bfloat16: whether the numbers are bfloat16 instead of float32.
    """

    images: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    stride: tuple[int, int]
    pitch: int
    batch: int
    front: int
    plane: int
    tile: int
    chunks: int
    phases: tuple[tuple[int, int], ...]
    taps: tuple[tuple[int, int], ...]
    bfloat16: bool = False

    @property
    def planes(self) -> int:
        """The number of input planes: one per channel and phase in use."""
        return self.channels * len(self.phases)

    @property
    def spread(self) -> int:
        """The numbers between the first and the last position that one output position reads in a plane."""
        shifts = [shift for _, shift in self.taps]
        return max(shifts) - min(shifts)

    def blocks(self, columns: int, rows: int, nonzeros: int) -> int:
        """Returns how many blocks to cut `columns` planes into, so that a block's tile stays in the first-level cache.

        There are no more blocks than leave each row enough non-zeros per block to pay for loading and storing its sums.
        """
        per_plane = 2 * self._read if self.bfloat16 else 4 * (min(self.tile, self.positions) + self.spread)
        wanted = -(-columns * per_plane // FIRST_LEVEL)
        # Tiles of linear layers are short; in bfloat16 products take less time, but loads and stores of sums do not.
        least = 24 if self.bfloat16 else 12 if self.height == self.width == 1 else 6
        affordable = nonzeros // (least * rows)
        return max(1, min(wanted, affordable, columns))

    @property
    def _read(self) -> int:
        """The numbers that a tile reads in a plane, on an average of the phases."""
        tile, total = min(self.tile, self.positions), 0
        for phase in range(len(self.phases)):
            shifts = sorted(shift for p, shift in self.taps if p == phase)
            total += tile + sum(min(tile, b - a) for a, b in itertools.pairwise(shifts))
        return -(-total // len(self.phases))

    @property
    def positions(self) -> int:
        """The numbers from the first output position to the last, gaps included."""
        return ((self.out_height - 1) * self.pitch + self.out_width) * self.batch

    def as_list(self, forward_blocks: int, backward_blocks: int) -> list[int]:
        """Returns the geometry as the list of integers that the native operators take."""
        head = [self.images, self.channels, self.height, self.width, self.out_channels]
        head += [self.out_height, self.out_width, *self.stride, self.pitch, self.batch, self.front, self.plane]
        return [*head, self.tile, self.chunks, forward_blocks, backward_blocks, *(n for p in self.phases for n in p)]


def kernel_taps(spec: Spec) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns, for each kernel position, the (row, column) phase it reads and its (row, column) shift in that phase."""
    result = []
    for y in range(spec.kernel[0]):
        for x in range(spec.kernel[1]):
            at = (y * spec.dilation[0] - spec.padding[0], x * spec.dilation[1] - spec.padding[1])
            phase = (at[0] % spec.stride[0], at[1] % spec.stride[1])
            result.append((phase, (at[0] // spec.stride[0], at[1] // spec.stride[1])))
    return result


def least_pitch(spec: Spec, size: tuple[int, int]) -> int:
    """Returns the smallest pitch, in positions, for which no tap reads the data of another row."""
    columns = [shift[1] for _, shift in kernel_taps(spec)]
    phase_width = -(-size[1] // spec.stride[1])
    out_width = spec.output_size(size)[1]
    return max(phase_width + max(0, -min(columns)), out_width + max(0, max(columns)))


def least_front(spec: Spec, pitch: int, batch: int) -> int:
    """Returns the zeros needed before a plane's first position (and after its last): a multiple of `LINE` floats."""
    reach = max(abs(row * pitch + column) for _, (row, column) in kernel_taps(spec))
    return -(-reach * batch // LINE) * LINE


def plane_stride(front: int, positions: int, line: int = LINE) -> int:
    """Returns the numbers from one plane to the next: an odd number of lines, which spreads planes over cache sets."""
    lines = -(-(positions + 2 * front) // line) + 1
    return (lines | 1) * line


@dataclass(frozen=True)
class Lanes:
    """The layout of rows in planes, on which layers that share activations must agree."""

    pitch: int
    front: int
    plane: int


def least_lanes(
    layers: list[tuple[Spec, tuple[int, int]]],
    batch: int,
    sizes: tuple[tuple[int, int], ...] = (),
    line: int = LINE,
) -> Lanes:
    """Returns the tightest lanes that suit all `layers` (spec and input size) and hold planes of all `sizes`.

    `line` is how many numbers a cache line holds.
    """
    sizes = list(sizes)
    for spec, size in layers:
        sizes.append(tuple(-(-n // s) for n, s in zip(size, spec.stride, strict=True)))
        sizes.append(spec.output_size(size))
    pitch = max([least_pitch(spec, size) for spec, size in layers] + [width for _, width in sizes])
    front = max([least_front(spec, pitch, batch) for spec, _ in layers], default=0)
    positions = max(((height - 1) * pitch + width) * batch for height, width in sizes)
    return Lanes(pitch, front, plane_stride(front, positions, line))


def _panel_lanes(spec: Spec, size: tuple[int, int], batch: int, vector: int) -> Lanes | None:
    """Returns lanes that hold a panel of positions instead of an image, for a 1x1 layer; None for any other layer."""
    pointwise = spec.kernel == (1, 1) == spec.stride and spec.padding == (0, 0)
    positions = size[0] * size[1]
    if batch > 1 or not pointwise or positions <= PANEL or positions % vector:
        return None
    return Lanes(size[1], 0, PANEL + LINE)


def geometry(
    spec: Spec,
    images: int,
    size: tuple[int, int],
    *,
    vector: int,
    batch: int = 1,
    chunks: int = 1,
    tile: int = 0,
    lanes: Lanes | None = None,
    bfloat16: bool = False,
) -> Geometry:
    """Returns the geometry of a layer for a number of images of one size.

    Args:
        spec: the layer.
        images: the number of images (rows of a linear layer's input).
        size: height and width of the input.
        vector: numbers in a vector of the kernels.
        batch: number of images that lie innermost in a plane: 1, or a multiple of `vector`.
        chunks: number of groups of rows that threads share; lowered until it divides the rows of both directions.
        tile: numbers computed at a time; 0 for the default.
        lanes: the lanes shared with other layers; None for the tightest ones of this layer alone.
        bfloat16: whether the planes hold bfloat16 numbers; images then lie innermost.
    """
    taps = kernel_taps(spec)
    phases = tuple(sorted({phase for phase, _ in taps}))
    out_height, out_width = spec.output_size(size)
    if bfloat16:
        lanes = least_lanes([(spec, size)], batch, line=LINE_OF_HALVES)
    lanes = lanes or _panel_lanes(spec, size, batch, vector) or least_lanes([(spec, size)], batch)
    planes = spec.in_channels * len(phases)
    while chunks > 1 and (spec.out_channels % chunks or planes % chunks):
        chunks -= 1
    return Geometry(
        images=images,
        channels=spec.in_channels,
        height=size[0],
        width=size[1],
        out_channels=spec.out_channels,
        out_height=out_height,
        out_width=out_width,
        stride=spec.stride,
        pitch=lanes.pitch,
        batch=batch,
        front=lanes.front,
        plane=lanes.plane,
        tile=tile or vector * (8 if spec.kernel == (1, 1) else 12),
        chunks=chunks,
        phases=phases,
        taps=tuple((phases.index(phase), (row * lanes.pitch + column) * batch) for phase, (row, column) in taps),
        bfloat16=bfloat16,
    )
