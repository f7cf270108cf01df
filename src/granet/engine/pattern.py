"""The index structures of a sparse weight, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from granet.engine.geometry import Geometry
from granet.engine.spec import Spec


@dataclass(frozen=True)
class Pattern:
    """A sparse matrix in compressed rows, cut into chunks of rows and blocks of columns, all int32.

    Stored row (chunk * blocks + block) * (rows / chunks) + i is the i-th shortest of the chunk's rows in that block of
    columns; chunk c deals with rows c, c + chunks, ...

    Attributes:
        ptr: where each stored row's non-zeros begin, and the end of the last.
        id: the output plane of each stored row.
        offset: floats from a tile's first input position to each non-zero's.
        index: each non-zero's place in the flattened dense weight.
        blocks: into how many blocks the columns are cut.
    """

    ptr: Tensor
    id: Tensor
    offset: Tensor
    index: Tensor
    blocks: int

    @property
    def nonzeros(self) -> int:
        """The number of non-zeros."""
        return self.index.numel()

    @property
    def nbytes(self) -> int:
        """Bytes the structure occupies."""
        return sum(4 * t.numel() for t in (self.ptr, self.id, self.offset, self.index))


def patterns(mask: Tensor, spec: Spec, geometry: Geometry) -> tuple[Pattern, Pattern]:
    """The forward pattern (rows are output channels) and the backward one (rows are input planes) of a mask.

    Args:
        mask: True where the weight is active, of the weight's own shape.
        spec: the layer.
        geometry: where its activations lie.
    """
    index = mask.reshape(-1).nonzero().squeeze(1)
    row, plane, shift = coordinates(index, spec, geometry)
    if max(geometry.planes, geometry.out_channels) * geometry.plane >= 2**31:
        raise ValueError("the activations of one block of images exceed 8 GiB")
    columns, rows = geometry.planes, geometry.out_channels
    forward_offset = plane * geometry.plane + shift
    backward_offset = row * geometry.plane - shift
    forward = _compress(row, plane, forward_offset, index, rows, columns, geometry)
    return forward, _compress(plane, row, backward_offset, index, columns, rows, geometry)


def coordinates(index: Tensor, spec: Spec, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Output channel, input plane and shift in floats of the weights at flat positions `index`."""
    taps = spec.kernel[0] * spec.kernel[1]
    per_group = spec.in_channels // spec.groups
    row = index // (per_group * taps)
    within = index % (per_group * taps)
    channel = row // (spec.out_channels // spec.groups) * per_group + within // taps
    phase = torch.tensor([p for p, _ in geometry.taps])[within % taps]
    shift = torch.tensor([s for _, s in geometry.taps])[within % taps]
    return row, channel * len(geometry.phases) + phase, shift


def _compress(
    row: Tensor, column: Tensor, offset: Tensor, index: Tensor, rows: int, columns: int, geometry: Geometry
) -> Pattern:
    blocks, chunks = geometry.blocks(columns, rows, index.numel()), geometry.chunks
    per_block, per_chunk = -(-columns // blocks), rows // chunks
    blocks = -(-columns // per_block)
    # The group of a non-zero: its chunk and block; and the row's place among the group's rows.
    group = (row % chunks) * blocks + column // per_block
    place = group * per_chunk + row // chunks
    length = torch.bincount(place, minlength=rows * blocks).view(chunks * blocks, per_chunk)
    order = length.argsort(dim=1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(per_chunk).expand_as(order))
    stored = group * per_chunk + rank.view(-1)[place]
    by_row = (stored * columns + column).argsort(stable=True)
    ptr = torch.zeros(rows * blocks + 1, dtype=torch.int64)
    torch.cumsum(length.gather(1, order).view(-1), 0, out=ptr[1:])
    ids = order * chunks + (torch.arange(chunks).repeat_interleave(blocks)).unsqueeze(1)
    return Pattern(
        ptr.int(), ids.reshape(-1).int(), offset[by_row].int(), index[by_row].int(), blocks
    )
