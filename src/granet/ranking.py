"""The n best of many scores, exactly: on the CPU, on another device, in shards on many ranks.

Equal scores are ordered by position: the earlier layer, then the smaller flat index, comes first. Scores that are NaN
or infinite are refused, because one of them would decide everything.

On the CPU and in shards an even sample of the scores brackets the n-th best between `low` and `high`. One pass then
selects what lies above `high` and sets aside what lies between, and the few set aside are ranked exactly. Should the
bracket miss, it is widened.
"""

from collections.abc import Sequence
from functools import reduce
from math import inf, isfinite, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from granet import native, shards
from granet.criterion import Criterion, Layer, NonFiniteScores

_PART = 1 << 16  # weights looked at together: scores and comparisons of one part stay in the cache
_PART_NATIVE = 1 << 20
_SMALL = 1 << 16  # scores so few that all of them are ranked
_NOT_FINITE = "a score is NaN or infinite: the gradients or weights overflowed at this step"


class Found(NamedTuple):
    """What one pass found in a layer.

    Attributes:
        chosen: True where a candidate's score is above `high`; flat.
        above: how many those are.
        at: the places of the candidates from `low` to `high`.
        scores: their scores.
    """

    chosen: Tensor
    above: int
    at: Tensor
    scores: Tensor


def top(
    layers: Sequence[Layer], criterion: Criterion, n: int, among: Sequence[Tensor], candidates: int
) -> list[Tensor]:
    """`granet.topology.top` for `n` above 0 and below the number of `candidates`."""
    if any(shards.is_sharded(mask) for mask in among):
        return top_sharded(layers, criterion, n, among, candidates)
    select = top_cpu if all(mask.device.type == "cpu" for mask in among) else top_device
    flat = select(layers, criterion, n, [mask.reshape(-1) for mask in among], candidates)
    return [chosen.view(mask.shape) for chosen, mask in zip(flat, among, strict=True)]


def top_cpu(layers, criterion, n, among, candidates) -> list[Tensor]:
    """`top` on the CPU; masks are flat."""
    low, high = _bracket(layers, criterion, n, among, candidates)
    least = _next(low, layers)  # without the lowest score itself: it may be zero, and most others too
    while True:
        found = [_look(layer, criterion, mask, least, high) for layer, mask in zip(layers, among, strict=True)]
        above = sum(one.above for one in found)
        ranked = np.concatenate([one.scores.numpy() for one in found])
        if above <= n <= above + ranked.size:
            break
        if least == low or above > n:
            low, high = _wider(low, high, n, above)
        least = low
    if n > above:
        best = n - above
        threshold = np.partition(ranked, ranked.size - best)[ranked.size - best]
        keep = ranked > threshold
        equal = np.flatnonzero(ranked == threshold)
        keep[equal[: best - np.count_nonzero(keep)]] = True
        _add(found, torch.from_numpy(keep))
    return [one.chosen for one in found]


def top_device(layers, criterion, n, among, candidates) -> list[Tensor]:
    """`top` on any other device, or several, the threshold by torch's own selection on one of them; masks are flat."""
    home = next((mask.device for mask in among if mask.device.type != "cpu"), among[0].device)
    scores = [_finite(criterion(layer)).reshape(-1) for layer in layers]
    pool = torch.cat([values[mask].to(home) for values, mask in zip(scores, among, strict=True)])
    best = 2 * n <= candidates
    picked = pool.topk(n if best else candidates - n + 1, largest=best, sorted=False).values
    threshold = picked.min() if best else picked.max()
    thresholds = [threshold.to(values.device) for values in scores]
    chosen = [
        (values > least).logical_and_(mask) for values, least, mask in zip(scores, thresholds, among, strict=True)
    ]
    missing = n - sum(int(torch.count_nonzero(mask)) for mask in chosen)
    for values, least, mask, out in zip(scores, thresholds, among, chosen, strict=True):
        ties = (values == least).logical_and_(mask).nonzero().squeeze(1)[:missing]
        out[ties] = True
        missing -= ties.numel()
    return chosen


def top_sharded(layers, criterion, n, among, candidates) -> list[Tensor]:
    """`top` where some of the masks are sharded: each rank looks at its own part, sums and histograms are sent.

    All ranks must call it together. The choice is that of one process, to the last tie.

    Raises:
        ValueError: the tensors lie in different meshes.
        NonFiniteScores: a score on any of the ranks is NaN or infinite; raised on all of them.
    """
    mesh = next(mask.device_mesh for mask in among if shards.is_sharded(mask))
    if any(shards.is_sharded(mask) and mask.device_mesh != mesh for mask in among):
        raise ValueError("the sparse parameters lie in different device meshes; shard all of them over one")
    parts = [_flat_part(layer) for layer in layers]
    masks = [shards.local(mask).reshape(-1) for mask in among]
    # a part that several ranks hold is counted by the first of them
    owned = [shards.is_owner(mask, mesh) for mask in among]

    low, high = _bracket_sharded(parts, criterion, n, masks, candidates, owned, mesh, sum(m.numel() for m in among))
    while True:
        finite, found = True, []
        for part, mask in zip(parts, masks, strict=True):
            try:
                found.append(_look(part, criterion, mask, low, high))
            except NonFiniteScores:
                finite = False
                break
        mine = [one for one, owner in zip(found, owned, strict=False) if owner]
        counts = [sum(one.above for one in mine), sum(one.at.numel() for one in mine), int(not finite)]
        above, inside, broken = shards.summed(torch.tensor(counts, device=masks[0].device), mesh).tolist()
        if broken:
            raise NonFiniteScores(f"{_NOT_FINITE}, on some rank")
        if above <= n <= above + inside:
            break
        low, high = _wider(low, high, n, above)

    if n > above:
        kind = reduce(torch.promote_types, [one.scores.dtype for one in found])
        keys = [shards.ordered(one.scores.to(kind)) for one in found]
        bits = 8 * keys[0].element_size()
        threshold, larger, equal = shards.nth(_owned(keys, owned), bits, n - above, mesh)
        keep = [key > threshold for key in keys]
        ties = [key == threshold for key in keys]
        missing = n - above - larger
        if equal > missing:  # those that come first: the earlier layer, the smaller index in the whole tensor
            begin, places = 0, []
            for one, tie, mask in zip(found, ties, among, strict=True):
                places.append(-1 - begin - shards.positions(mask, one.at[tie]))
                begin += mask.numel()
            last, *_ = shards.nth(_owned(places, owned), begin.bit_length() + 1, missing, mesh)
            for tie, place in zip(ties, places, strict=True):
                tie[tie.clone()] = place >= last
        _add(found, torch.cat([a | b for a, b in zip(keep, ties, strict=True)]))
    whole = [one.chosen.view(shards.local(mask).shape) for one, mask in zip(found, among, strict=True)]
    return [shards.like(out, mask) if shards.is_sharded(mask) else out for out, mask in zip(whole, among, strict=True)]


def _flat_part(layer: Layer) -> Layer:
    grad = None if layer.grad is None else shards.local(layer.grad)
    return Layer(shards.local(layer.weight), grad).flat()


def _owned(values: list[Tensor], owned: list[bool]) -> Tensor:
    return torch.cat([one if mine else one[:0] for one, mine in zip(values, owned, strict=True)])


def _add(found: Sequence[Found], keep: Tensor) -> None:
    """Set those of the ranked scores that `keep` says, in the order of the layers, True in `chosen`."""
    for one, kept in zip(found, keep.split([one.at.numel() for one in found]), strict=True):
        one.chosen[one.at[kept]] = True


def _look(layer: Layer, criterion: Criterion, mask: Tensor, low: float, high: float) -> Found:
    """One pass over a flat layer."""
    if mask.device.type != "cpu":
        scores = _finite(criterion(layer))
        chosen = (scores > high).logical_and_(mask)
        at = (scores >= low).logical_and_(mask).logical_and_(~chosen).nonzero().squeeze(1)
        return Found(chosen, int(torch.count_nonzero(chosen)), at, scores[at])
    compare, size = (_compare_native, _PART_NATIVE) if native.ready() else (_compare, _PART)
    chosen = torch.empty_like(mask)
    above, at, scores, start = 0, [], [], 0
    for part, candidates, out in zip(layer.parts(size), mask.split(size), chosen.split(size), strict=True):
        more, places, inside = compare(part, criterion, candidates, low, high, out)
        above += more
        at.append(places + start if start else places)
        scores.append(inside)
        start += candidates.numel()
    return Found(chosen, above, torch.cat(at), torch.cat(scores))


def _compare(part: Layer, criterion: Criterion, mask: Tensor, low: float, high: float, out: Tensor):
    """How many candidates are above `high`, set True in `out`, and the places and scores of those from `low` to it."""
    given = _plain(_finite(criterion(part)))
    scores, out = given.numpy(), out.numpy()
    between = scores >= low
    np.greater(scores, high, out=out)
    between &= mask.numpy()
    out &= between
    between ^= out
    at = torch.from_numpy(np.flatnonzero(between))
    return int(np.count_nonzero(out)), at, given[at]


def _compare_native(part: Layer, criterion: Criterion, mask: Tensor, low: float, high: float, out: Tensor):
    """`_compare` by the compiled kernel, which reads weights or gradients directly where the absolute value counts."""
    field = getattr(criterion, "absolute", None)
    raw = getattr(part, field) if field else None
    absolute = raw is not None and raw.dtype == torch.float32
    scores = raw if absolute else criterion(part)
    if scores.dtype != torch.float32:
        return _compare(part, criterion, mask, low, high, out)
    at, inside, above, finite = torch.ops.granet.select_pass(scores.contiguous(), mask, absolute, low, high, out)
    if not finite:
        raise NonFiniteScores(_NOT_FINITE)
    return above, at, inside


def _next(low: float, layers: Sequence[Layer]) -> float:
    """The score that follows `low`."""
    kind = np.float64 if any(layer.dtype == torch.float64 for layer in layers) else np.float32
    return float(np.nextafter(kind(low), kind(inf))) if low > -inf else low


def _wider(low: float, high: float, n: int, above: int) -> tuple[float, float]:
    """The bracket to try next, after one that had `above` candidates above it."""
    if (low, high) == (-inf, inf):
        raise ValueError(f"there are fewer than {n} candidates")
    if above > n:
        return low, inf
    # a lower one by steps: all scores at once would be as many as there are weights
    return (low / 4 if low > 0 and low > high * 1e-4 else -inf), high


def _of_many_kinds(layers: Sequence[Layer]) -> bool:
    """Whether types differ: a bound of one type would be rounded in another."""
    return len({layer.dtype for layer in layers}) > 1


def _sample(layers, criterion, among, stride) -> list[Tensor]:
    """The scores of every `stride`-th entry of each layer, where it is a candidate."""
    sample = []
    for layer, mask in zip(layers, among, strict=True):
        thin = layer.every(stride)
        sample.append(_plain(criterion(thin)[mask[::stride]]))
    return sample


def _plain(scores: Tensor) -> Tensor:
    """The scores in a type that NumPy has."""
    return scores.float() if scores.dtype == torch.bfloat16 else scores


def _stride(total: int) -> int:
    # reading n samples costs about n, ranking what they bracket total / sqrt(n): the best n grows as total ** (2 / 3)
    return round(total ** (1 / 3)) | 1  # odd, so that it meets all columns of a matrix whose width is a power of two


def _ranks(size: int, share: float) -> tuple[int, int]:
    """The ranks in a sample of that size, from the lowest, between which its share very probably ends."""
    slack = 3 * sqrt(size * share * (1 - share)) + 2
    return int(size * (1 - share) - slack), int(size * (1 - share) + slack)


def _bracket(layers, criterion, n, among, candidates) -> tuple[float, float]:
    """Two scores between which the n-th best of the candidates very probably lies, from an even sample."""
    total = sum(layer.numel() for layer in layers)
    if total <= _SMALL or _of_many_kinds(layers):
        return -inf, inf
    sample = torch.cat(_sample(layers, criterion, among, _stride(total))).numpy()
    first, last = _ranks(sample.size, n / candidates)
    inner = [rank for rank in (first, last) if 0 <= rank < sample.size]
    ordered = np.partition(sample, inner) if inner else sample
    return (ordered[first] if first in inner else -inf), (ordered[last] if last in inner else inf)


def _bracket_sharded(parts, criterion, n, masks, candidates, owned, mesh, total) -> tuple[float, float]:
    """`_bracket` from a sample of which every rank has a share; the same numbers on all of them."""
    if total <= _SMALL or _of_many_kinds(parts):
        return -inf, inf
    values = _owned(_sample(parts, criterion, masks, _stride(total)), owned)
    size = int(shards.summed(torch.tensor(values.numel(), device=values.device), mesh))
    keys = shards.ordered(values)
    found = []
    for rank, without in zip(_ranks(size, n / candidates), (-inf, inf), strict=True):
        inner = 0 <= rank < size
        key = shards.nth(keys, 8 * keys.element_size(), size - rank, mesh)[0] if inner else None
        found.append(shards.score_of(key, values.dtype) if inner else without)
    low, high = found
    return (low if isfinite(low) else -inf), (high if isfinite(high) else inf)


def _finite(scores: Tensor) -> Tensor:
    """`scores`, if all of them are finite."""
    if scores.numel():
        low, high = torch.aminmax(scores)
        if not (isfinite(low.item()) and isfinite(high.item())):
            raise NonFiniteScores(_NOT_FINITE)
    return scores
