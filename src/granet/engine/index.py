"""The index structures of a sparse weight, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from granet.engine.geometry import Geometry
from granet.engine.spec import Spec


@dataclass(frozen=True)
class IndexStructure:
    """The index structure of a sparse matrix in compressed rows, cut into chunks of rows and blocks of columns.

    Chunk c holds the rows c, c + chunks, c + 2 * chunks, ... Stored row (chunk * blocks + block) * (rows / chunks) + i
    is the i-th shortest of the chunk's rows in that block of columns. All tensors are int32.

    Attributes:
        ptr: the position of each stored row's first non-zero, and the end of the last row.
        id: the output plane of each stored row.
        offset: for each non-zero, the floats from a tile's first input position to the one it reads.
        index: the position of each non-zero in the memory of the dense weight.
        blocks: the number of blocks of columns.
        chunks: the number of chunks of rows.
    """

    ptr: Tensor
    id: Tensor
    offset: Tensor
    index: Tensor
    blocks: int
    chunks: int

    @property
    def nonzeros(self) -> int:
        """The number of non-zeros."""
        return self.index.numel()

    @property
    def nbytes(self) -> int:
        """The bytes that the structure occupies."""
        return sum(4 * t.numel() for t in (self.ptr, self.id, self.offset, self.index))


def index_structures(
    mask: Tensor, geometry: Geometry, *, channels_last: bool = False
) -> tuple[IndexStructure, IndexStructure]:
    """Returns the structures of a mask: forward, whose rows are output channels, and backward, of input planes.

    Args:
        mask: True where the weight is active, of the weight's own shape.
        geometry: the geometry of the layer's activations.
        channels_last: whether `index` counts the weights in the order of that memory format, instead of a contiguous
            tensor's.
    """
    _check_reach(geometry)
    planes, outputs, nonzeros = geometry.planes, geometry.out_channels, int(mask.count_nonzero())
    blocks = [
        -(-units // -(-units // geometry.blocks(columns, rows, nonzeros)))  # as many as equal blocks of units need
        for units, columns, rows in ((geometry.channels, planes, outputs), (outputs, outputs, planes))
    ]
    taps = [number for tap in geometry.taps for number in tap]
    found = torch.ops.granet.index_structures(
        mask.contiguous(),
        taps,
        outputs,
        geometry.channels,
        len(geometry.phases),
        geometry.plane,
        geometry.chunks,
        *blocks,
        channels_last,
    )
    forward, backward = (
        IndexStructure(*t, n, geometry.chunks) for t, n in ((found[:4], blocks[0]), (found[4:], blocks[1]))
    )
    return forward, backward


def forward_structure(
    mask: Tensor,
    spec: Spec,
    geometry: Geometry,
    *,
    group: int = 1,
    chunks: int | None = None,
    blocks: int | None = None,
) -> IndexStructure:
    """Returns the structure whose rows are output channels, or groups of channels that share their positions.

    With `group` > 1, a position counts as active if it is so for any channel of the group, `id` names the group's first
    channel, and `index` holds `group` numbers per non-zero. `chunks` and `blocks` override those of the geometry.
    """
    _check_reach(geometry)
    taps, per_group = spec.kernel[0] * spec.kernel[1], spec.in_channels // spec.groups
    rows, phases = geometry.out_channels // group, len(geometry.phases)
    active = mask.reshape(rows, group, per_group, taps)
    row, channel, tap = (active.any(dim=1) if group > 1 else active[:, 0]).nonzero(as_tuple=True)
    index = (row * group * per_group + channel) * taps + tap
    if spec.groups > 1:
        channel = channel + row * group // (spec.out_channels // spec.groups) * per_group
    phase, shift = (torch.tensor(numbers)[tap] for numbers in zip(*geometry.taps, strict=True))
    offset = (channel * phases + phase) * geometry.plane + shift

    chunks = chunks or geometry.chunks
    blocks = 1 if group > 1 else blocks or geometry.blocks(geometry.planes, rows, index.numel())
    per_block = -(-spec.in_channels // blocks)  # channels: their phases stay together
    blocks, per_chunk = -(-spec.in_channels // per_block), rows // chunks
    # The weights that a row has in a block follow each other in `index`, so a run of them need not be sorted.
    length = torch.bincount(row * blocks + channel // per_block, minlength=rows * blocks)
    begin = length.cumsum(0) - length
    run = torch.arange(rows * blocks).view(per_chunk, chunks, blocks).permute(1, 2, 0)
    order = length[run].argsort(dim=2, stable=True)
    run = run.gather(2, order).reshape(-1)
    ptr = torch.zeros(rows * blocks + 1, dtype=torch.int64)
    torch.cumsum(length[run], 0, out=ptr[1:])
    source = torch.repeat_interleave(begin[run] - ptr[:-1], length[run]) + torch.arange(index.numel())
    index = index[source]
    if group > 1:
        index = (index.unsqueeze(1) + torch.arange(group) * per_group * taps).reshape(-1)
    return IndexStructure(ptr.int(), (run // blocks * group).int(), offset[source].int(), index.int(), blocks, chunks)


def _check_reach(geometry: Geometry) -> None:
    if max(geometry.planes, geometry.out_channels) * geometry.plane >= 2**31:
        raise ValueError("the activations of one block of images exceed 8 GiB")
