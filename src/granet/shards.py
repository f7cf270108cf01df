"""Tensors in shards on many ranks (DTensor: FSDP2, tensor parallelism): counting and comparing over all of them.

Nothing is gathered, except by `gather` and `place_like`. Every rank looks at its own shard and what is sent around are
sums and histograms, so that the bytes sent do not depend on the number of weights. The n-th largest of all is found
digit by digit: scores become integers of the same order, a histogram of their first eleven bits is summed over the
ranks, the bin with the n-th largest is kept, and its next eleven bits follow. All ranks must call these functions
together.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_DIGIT = 11  # bits looked at in one round: a histogram of 2,048 numbers, 16 KiB
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return getattr(tensor, "device_mesh", None) is not None


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(values: Tensor, tensor: DTensor) -> DTensor:
    """`values`, this rank's part, as a whole in the mesh, placement and shape of `tensor`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def gather(tensor: Tensor) -> Tensor:
    """All of `tensor` on every rank, for which all ranks ask together; a plain tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard(whole: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of `whole`, which every rank has, in the placement of `tensor`; nothing is sent."""
    if is_sharded(whole):
        return whole
    shape, offset = _place(tensor)
    part = whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]
    return like(part.to(local(tensor).device).contiguous(), tensor)


def count(mask: DTensor) -> int:
    """The number of True entries on all ranks."""
    mine = torch.count_nonzero(local(mask)) if is_owner(mask) else torch.zeros((), dtype=torch.int64, device="cpu")
    return int(summed(mine.to(local(mask).device, torch.int64), mask.device_mesh))


def anywhere(flag: bool, tensor: DTensor) -> bool:
    """Whether `flag` is True on any rank of the mesh of `tensor`."""
    return bool(summed(torch.tensor(int(flag), device=local(tensor).device), tensor.device_mesh))


def nonzero(tensor: Tensor) -> bool:
    """Whether any entry is not zero, on any rank."""
    found = bool(local(tensor).any())
    return anywhere(found, tensor) if is_sharded(tensor) else found


def positions(tensor: Tensor, at: Tensor | None = None) -> Tensor:
    """The flat index, in the whole tensor, of each entry of this rank's part: int64, of the part's shape.

    With `at`, of those entries alone: they are given by their flat index in this rank's part.
    """
    shape, offset = _place(tensor) if is_sharded(tensor) else (tuple(tensor.shape), (0,) * tensor.ndim)
    device = local(tensor).device
    index, step, rest = torch.zeros((), dtype=torch.int64, device=device), 1, at
    for dim in reversed(range(len(shape))):
        if at is None:
            along = torch.arange(shape[dim], device=device).view(-1, *[1] * (len(shape) - 1 - dim))
        else:
            along, rest = rest % shape[dim], rest // shape[dim]
        index = index + (along + offset[dim]) * step
        step *= tensor.shape[dim]
    return index


def verify(masks: Mapping[str, Tensor], counters: Mapping[str, int], device: torch.device) -> None:
    """Compare this rank's masks and counters with those of all other ranks, by a checksum of each mask.

    Every rank of the default process group calls it together; what is sent are sixteen bytes for each parameter. Ranks
    that hold the same part of a sharded mask are compared with one another. Does nothing without a process group, or
    with one rank.

    Raises:
        RuntimeError: on all ranks; names the first parameter or counter that differs and the ranks that differ.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    mine = {name: (zlib.crc32(repr(_part(mask)).encode()), checksum(mask)) for name, mask in masks.items()}
    mine |= {name: (0, value) for name, value in counters.items()}
    names = [len(masks), zlib.crc32(repr(list(mine)).encode())]
    sizes = _gathered(torch.tensor(names, device=device))  # ranks with other parameters would wait for ever
    if len(set(map(tuple, sizes))) > 1:
        raise RuntimeError(
            f"the ranks have different sparse parameters, {[n for n, _ in sizes]} of them; where ranks hold "
            "different parts of a network (a pipeline), Sparsifier(..., verify_every=0) leaves them alone"
        )
    table = _gathered(torch.tensor(list(mine.values()), device=device))
    for at, name in enumerate(mine):
        seen: dict[int, tuple[int, int]] = {}  # part -> the first rank that has it, and its checksum
        for rank, row in enumerate(table):
            part, value = row[at]
            first, expected = seen.setdefault(part, (rank, value))
            if value != expected:
                others = [r for r, row in enumerate(table) if row[at][0] == part and row[at][1] != expected]
                raise RuntimeError(
                    f"the topology differs between ranks: {name!r} on rank {', '.join(map(str, others))} is not that "
                    f"of rank {first}. Give the sparsifier the same seed and the same weights on all ranks (make it "
                    "after the model was broadcast or loaded), and step it on the same, reduced gradients"
                )


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of this rank's part of `tensor`, in the order of its flat index."""
    return zlib.crc32(local(tensor).contiguous().cpu().numpy())


def total(values: Tensor) -> float:
    """The sum of all entries, on all ranks, in float64."""
    if not is_sharded(values):
        return float(values.sum(dtype=torch.float64))
    mine = local(values).double().sum()
    return float(summed(mine if is_owner(values) else torch.zeros_like(mine), values.device_mesh))


def place_like(values: Tensor, tensor: Tensor) -> Tensor:
    """`values`, whole or in shards, in the placement and on the device of `tensor`.

    Shards of another placement are gathered, which all ranks of their mesh do together.
    """
    if is_sharded(values):
        if is_sharded(tensor) and (values.device_mesh, values.placements) == (tensor.device_mesh, tensor.placements):
            return values
        values = values.full_tensor()
    return shard(values, tensor) if is_sharded(tensor) else values.to(tensor.device)


def _gathered(values: Tensor) -> list:
    """The numbers of every rank of the default process group, by rank."""
    import torch.distributed as dist

    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values)
    return torch.stack(found).tolist()


def _part(tensor: Tensor) -> tuple:
    """What tells the parts of a tensor apart: shape and offset; the same for a whole tensor anywhere."""
    return _place(tensor) if is_sharded(tensor) else ()


def nth(keys: Tensor, bits: int, n: int, mesh: DeviceMesh) -> tuple[int, int, int]:
    """The n-th largest of all ranks' signed `keys` of so many bits, how many are larger than it, how many equal it."""
    above, equal, prefix, shift = 0, 0, 0, bits
    lowest = -(1 << bits - 1)
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        digits = ((keys >> shift) & (1 << width) - 1).to(torch.int64)
        if shift + width == bits:  # the sign comes first: negative keys are the smaller half
            digits ^= 1 << width - 1
        found = summed(torch.bincount(digits, minlength=1 << width), mesh).flip(0)
        until = found.cumsum(0)
        at = int(torch.searchsorted(until, n - above))  # bins from the top until the n-th is inside
        digit = (1 << width) - 1 - at
        above += int(until[at - 1]) if at else 0
        equal = int(found[at])
        keys = keys[digits == digit]
        prefix = prefix << width | digit
    return lowest + prefix, above, equal


def ordered(scores: Tensor) -> Tensor:
    """Integers in the order of finite floating-point `scores`, of as many bits; -0.0 and 0.0 are equal."""
    raw = (scores + 0.0).contiguous().view(_INTEGER[scores.dtype.itemsize])
    return torch.where(raw < 0, raw ^ torch.iinfo(raw.dtype).max, raw)


def score_of(key: int, dtype: torch.dtype) -> float:
    """The score whose place in the order is `key`: the reverse of `ordered`."""
    kind = _INTEGER[dtype.itemsize]
    raw = key ^ torch.iinfo(kind).max if key < 0 else key
    return float(torch.tensor(raw, dtype=kind).view(dtype))


def summed(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over all ranks of the mesh."""
    import torch.distributed as dist

    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            dist.all_reduce(values, group=mesh.get_group(dim))
    return values


def is_owner(tensor: Tensor, mesh: DeviceMesh | None = None) -> bool:
    """Whether this rank counts its part: of ranks with the same part only the first does."""
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh if mesh is None else mesh
    place = mesh.get_coordinate()
    placements = tensor.placements if is_sharded(tensor) else [Replicate()] * mesh.ndim
    return all(at == 0 for at, placement in zip(place, placements, strict=True) if placement.is_replicate())


def _place(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
