"""Topology operations: masks and scores in, masks out, with exact counts.

A mask is a bool tensor of its parameter's shape, True where the weight is active; no operation changes the masks it is
given. Every operation takes whole numbers and gives back exactly that many entries. Equal scores are ordered by
position: the earlier layer, then the smaller flat index, is kept (or grown) first. Scores that are NaN or infinite are
refused with `NonFiniteScores`, because one of them would decide the whole topology.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from math import floor, inf, isfinite, prod

import numpy as np
import torch
from torch import Tensor

from granet import distribution, ranking, shards
from granet.criterion import Criterion, Layer, own_values
from granet.criterion import NonFiniteScores as NonFiniteScores  # what `top` and all that is made of it may raise

Masks = Mapping[str, Tensor]
_PIECE = 1 << 16  # positions that are hashed together, in the cache

# multipliers of SplitMix64, as signed 64-bit numbers
_GOLDEN, *_MIX = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_PATTERN: ContextVar = ContextVar("pattern", default=None)  # what choices obey; None: any mask is allowed


@contextmanager
def obeying(pattern) -> Iterator[None]:
    """All operations inside the `with` choose by the order of `pattern`, a `granet.pattern.NM`; None: by score alone.

    A method so asks for masks in the same words whatever they have to obey.
    """
    token = _PATTERN.set(pattern)
    try:
        yield
    finally:
        _PATTERN.reset(token)


def top(
    layers: Sequence[Layer],
    criterion: Criterion,
    n: int,
    among: Sequence[Tensor],
    *,
    candidates: int | None = None,
    beside: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    """Masks of the `n` best entries of all `layers` together, by `criterion`, among the True entries of `among`.

    Args:
        layers: the layers whose entries compete.
        criterion: gives each entry its score.
        n: how many entries to select, from 0 to the number of candidates.
        among: for each layer a mask of the candidates.
        candidates: how many there are, if that is known.
        beside: where entries are grown, for each layer what is active beside them and what was before the update.

    Raises:
        ValueError: `n` is negative or larger than the number of candidates.
        NonFiniteScores: a score is NaN or infinite.
    """
    if candidates is None:
        candidates = sum(count(mask) for mask in among)
    if not 0 <= n <= candidates:
        raise ValueError(f"cannot select {n} of {candidates} candidates")
    if n == candidates:
        return [mask.clone() for mask in among]
    if n == 0:
        return [torch.zeros_like(mask) for mask in among]
    if (pattern := _PATTERN.get()) is not None:
        with obeying(None):
            return pattern.top(layers, criterion, n, among, beside)
    return ranking.top(layers, criterion, n, among, candidates)


def top_of_rows(layer: Layer, criterion: Criterion, n: Tensor, among: Tensor) -> Tensor:
    """A mask of the best entries of every row, by `criterion`, among the True entries of `among`.

    A row holds all entries of one index of the first dimension: the weights of a neuron or of a filter.

    Args:
        layer: the layer.
        criterion: gives each entry its score.
        n: how many entries to select from every row, from 0 to the number of its candidates.
        among: a mask of the candidates.

    Raises:
        ValueError: a row has fewer candidates, or the layer is sharded.
        NonFiniteScores: a score is NaN or infinite.
    """
    _refuse_shards(among)
    candidates = row_counts(among)
    if bool((n < 0).any()) or bool((n > candidates).any()):
        raise ValueError("cannot select more entries of a row than it has candidates, or fewer than none")
    if torch.equal(n, candidates):
        return among.clone()
    scores = criterion(layer)
    low, high = scores.aminmax()
    if not (isfinite(low) and isfinite(high)):
        raise NonFiniteScores("a score is NaN or infinite, so no row can be ranked")
    scores, n = scores.where(among, -inf).flatten(1), n[:, None]
    best = scores.topk(max(1, int(n.max())), dim=1).values
    least = best.gather(1, (n - 1).clamp(min=0)).where(n > 0, inf)  # the n-th best of each row
    chosen = scores >= least
    spare = row_counts(chosen)[:, None] - n
    tied = spare.flatten().nonzero().flatten()  # rows in which too many equal it: the last of them go
    equal = scores[tied] == least[tied]
    chosen[tied] ^= equal & (equal.flip(1).cumsum(1).flip(1) <= spare[tied])
    return chosen.view(among.shape)


def row_counts(mask: Tensor) -> Tensor:
    """The number of True entries in every row: int64, one for each index of the first dimension."""
    flat = mask.flatten(1)
    if flat.device.type == "cpu":  # many times as fast as torch's own
        return torch.from_numpy(np.count_nonzero(flat.numpy(), axis=1))
    return torch.count_nonzero(flat, 1)


def in_rows(mask: Tensor, chosen: Tensor) -> Tensor:
    """`mask` in the rows that are True in `chosen`, and False in all others."""
    return mask & chosen.view(-1, *[1] * (mask.ndim - 1))


def _refuse_shards(tensor: Tensor, name: str = "the layer") -> None:
    if shards.is_sharded(tensor):
        raise ValueError(
            f"{name} is sharded over ranks, and a constant fan-in needs all weights of each neuron in one place: "
            "replicate it (DDP), or choose a method without a constant fan-in, such as RigL"
        )


def drop(mask: Tensor, scores: Tensor, n: int) -> Tensor:
    """`mask` without its `n` active entries of the lowest score."""
    return top([Layer(scores)], own_values, count(mask) - n, [mask])[0]


def grow(mask: Tensor, scores: Tensor, n: int) -> Tensor:
    """`mask` with the `n` inactive entries of the highest score active as well."""
    return mask | top([Layer(scores)], own_values, n, [~mask], beside=[(mask, mask)])[0]


def part(ratio: float, n: int) -> int:
    """`ratio * n`, rounded down; the ratio is read as the decimal number that it prints as.

    >>> part(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return floor(Fraction(repr(round(ratio, 12))) * n)


def exchange(
    mask: Tensor, layer: Layer, ratio: float, *, lose: Criterion, gain: Criterion, among: Tensor | None = None
) -> Tensor:
    """`mask` after a share `ratio` of its active entries was dropped by `lose` and as many were grown by `gain`.

    The number exchanged is `ratio * active`, rounded down. Entries that were just dropped are candidates again, as in
    RigL and GraNet, so it may be larger than the number of inactive entries; of a mask that is True everywhere the
    same mask comes back. With `among`, a mask of inactive entries, only those are grown, and the number exchanged is
    theirs if that is smaller.
    """
    active = count(mask)
    n = part(ratio, active) if among is None else min(part(ratio, active), count(among))
    if n == 0 or active == mask.numel():
        return mask
    kept = top([layer], lose, active - n, [mask], candidates=active)[0]
    if among is not None:
        return kept.logical_or_(top([layer], gain, n, [among])[0])
    inactive = mask.numel() - active + n
    if _PATTERN.get() is not None:
        return kept.logical_or_(top([layer], gain, n, [~kept], candidates=inactive, beside=[(kept, mask)])[0])
    others = kept.logical_not_()  # the same memory, for masks of large layers
    grown = top([layer], gain, n, [others], candidates=inactive)[0]
    return others.logical_not_().logical_or_(grown)


def rewire(mask: Tensor, layer: Layer, ratio: float, rng: torch.Generator, *, lose: Criterion) -> Tensor:
    """`exchange` that grows at random places, those just dropped among them."""
    active = count(mask)
    n = part(ratio, active)
    if n == 0 or active == mask.numel():
        return mask
    return grow_random(top([layer], lose, active - n, [mask], candidates=active)[0], n, rng)


def prune_to(masks: Masks, n: int, layers: Mapping[str, Layer], criterion: Criterion) -> dict[str, Tensor]:
    """The `n` best active entries of all layers together: global pruning to a total of `n`.

    Each layer keeps at least its own best entry, so that no layer is emptied. `n` at or above the number of active
    entries changes nothing.

    Raises:
        ValueError: `n` is smaller than the number of layers.
    """
    names = list(masks)
    active = sum(count(mask) for mask in masks.values())
    if n >= active:
        return dict(masks)
    if n < len(names):
        raise ValueError(f"{n} active weights cannot give each of {len(names)} layers at least one")
    ranked = top([layers[x] for x in names], criterion, n, [masks[x] for x in names], candidates=active)
    chosen = dict(zip(names, ranked, strict=True))
    empty = [name for name in names if not count(chosen[name])]
    if not empty:
        return chosen
    # the best entry of each layer that would be emptied stays; the rest compete for the places that are left
    saved = {name: top([layers[name]], criterion, 1, [masks[name]])[0] for name in empty}
    rest = [name for name in names if name not in saved]
    others = {name: layers[name] for name in rest}
    return {**masks, **saved, **prune_to({name: masks[name] for name in rest}, n - len(saved), others, criterion)}


def prune_each(masks: Masks, counts: Mapping[str, int], layers: Mapping[str, Layer], criterion: Criterion) -> dict:
    """Each layer's best active entries, `counts[name]` of them: layer-wise pruning.

    Where fewer are active all are kept, and the other layers keep so many more: as a total shrinks, the rounded part of
    a layer can grow by one.
    """
    active = {name: count(mask) for name, mask in masks.items()}
    n = {name: min(counts[name], active[name]) for name in masks}
    room = {name: active[name] - n[name] for name in masks}
    short = min(sum(counts[name] - n[name] for name in masks), sum(room.values()))
    more = distribution.share(short, room, room) if short else dict.fromkeys(n, 0)
    return {name: top([layers[name]], criterion, n[name] + more[name], [mask])[0] for name, mask in masks.items()}


def random_masks(
    counts: Mapping[str, int], shapes: Mapping[str, Sequence[int]], rng: torch.Generator
) -> dict[str, Tensor]:
    """Masks with `counts[name]` active entries each at random places, the same for every device and number of ranks."""
    return {
        name: grow_random(torch.zeros(tuple(shape), dtype=torch.bool, device="cpu"), counts[name], rng)
        for name, shape in shapes.items()
    }


def random_rows(fan_in: Mapping[str, int], layers: Mapping[str, Layer], rng: torch.Generator) -> dict[str, Tensor]:
    """Masks whose rows have `fan_in[name]` active entries each at random places, the same for every device.

    Raises:
        ValueError: a layer is sharded.
    """
    found = {}
    for name, layer in layers.items():
        _refuse_shards(layer.weight, repr(name))
        every = torch.ones(tuple(layer.shape), dtype=torch.bool, device="cpu")
        n = torch.full((len(every),), fan_in[name], device="cpu")
        found[name] = top_of_rows(_random(every, _seed(rng)), own_values, n, every)
    return found


def grow_random(mask: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """`mask` with `n` of its inactive entries, drawn uniformly, active as well."""
    scores = _random(mask, _seed(rng))
    return mask | top([scores], own_values, n, [~mask], beside=[(mask, mask)])[0]


def seeds(names: Iterable[str], rng: torch.Generator) -> dict[str, int]:
    """A random number for each name, of which `some` makes a draw."""
    return {name: _seed(rng) for name in names}


def some(mask: Tensor, share: float, seed: int) -> Tensor:
    """A mask of random inactive entries, `share` for each active one (rounded down), or all if there are fewer.

    The draw is uniform, and the same for every device and number of ranks.
    """
    active = count(mask)
    return top([_random(mask, seed)], own_values, min(part(share, active), mask.numel() - active), [~mask])[0]


def random_scores(tensor: Tensor, rng: torch.Generator) -> Tensor:
    """A float32 score in [0, 1) for every entry of `tensor`, of its shape, device and placement.

    It depends on one number drawn from `rng` and on the entry's flat index alone (the SplitMix64 generator of Steele,
    Lea and Flood 2014 at that index), so that shards of a tensor get the scores that they would have in the whole.
    """
    return _random(tensor, _seed(rng)).weight


def draw(scores: Tensor, rng: torch.Generator, sharpness: float = 1.0) -> Tensor:
    """Scores whose `n` highest are `n` entries drawn one after another with probabilities `scores ** sharpness`.

    The draw is without replacement, and this holds for every `n` and among any candidates: a random number of Gumbel's
    distribution is added to the logarithm (Efraimidis & Spirakis 2006; Kool et al. 2019). Entries whose score is zero
    come after all others, in random order, unless `sharpness` is 0.

    Args:
        scores: what probabilities are made of, none negative.
        rng: the random generator of the topology; one number is drawn from it.
        sharpness: the exponent: 0 draws uniformly, and the larger it is, the rarer are exceptions from the order.
    """
    uniform = (random_scores(scores, rng) + 2**-25).clamp(max=1 - 2**-24)  # neither 0 nor 1
    return sharpness * scores.clamp(min=1e-30).log() - (-uniform.log()).log()


def _random(tensor: Tensor, seed: int) -> "Layer | _Random":
    """Random scores for the entries of a tensor, as a layer."""
    if shards.is_sharded(tensor):
        return Layer(shards.like(_hashed(shards.positions(tensor), seed), tensor))
    return _Random(seed, tensor.shape, tensor.device)


def _seed(rng: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (), generator=rng, device="cpu"))


class _Random:
    """A layer of random scores, made when they are looked at; otherwise as a `granet.criterion.Layer`."""

    grad, effective, has_grad, dtype = None, None, False, torch.float32

    def __init__(self, seed: int, shape: torch.Size, device: torch.device):
        self._seed, self.shape, self._device = seed, shape, device

    @property
    def weight(self) -> Tensor:
        """All scores."""
        return self._from(0, self.numel()).view(self.shape)

    def numel(self) -> int:
        """Their number."""
        return prod(self.shape)

    def every(self, stride: int) -> Layer:
        """The first score of each `stride`, in the order of the flat index."""
        return Layer(self._from(0, self.numel(), stride))

    def parts(self, size: int) -> Iterator[Layer]:
        """The scores in consecutive pieces of at most `size`, each valid until the next is asked for."""
        room = torch.empty(min(size, self.numel()), device=self._device)
        for start in range(0, self.numel(), size):
            yield Layer(self._from(start, min(start + size, self.numel()), out=room))

    def _from(self, start: int, stop: int, stride: int = 1, out: Tensor | None = None) -> Tensor:
        """The scores from one flat index to another."""
        size = -(-(stop - start) // stride)
        scores = torch.empty(size, device=self._device) if out is None else out[:size]
        for i, piece in enumerate(scores.split(_PIECE)):
            first = start + i * _PIECE * stride
            places = torch.arange(first, first + len(piece) * stride, stride, device=self._device)
            piece.copy_(_hashed(places, self._seed))
        return scores


def _hashed(state: Tensor, seed: int) -> Tensor:
    """The score of each of the positions, which are changed in place."""
    state.add_(seed & (1 << 31) - 1).mul_(_GOLDEN).add_(seed)
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        state.bitwise_xor_((state >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return (state >> 40).bitwise_and_((1 << 24) - 1).float().div_(1 << 24)


def count(mask: Tensor) -> int:
    """The number of True entries."""
    if shards.is_sharded(mask):
        return shards.count(mask)
    if mask.device.type == "cpu":  # several times as fast as torch's own
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def dense_masks(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Masks with every entry active."""
    return {name: torch.ones(tuple(shape), dtype=torch.bool, device="cpu") for name, shape in shapes.items()}


def shapes_of(layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
    """The shape of every layer's weight."""
    pattern = _PATTERN.get()
    return {name: tuple(x.shape) if pattern is None else pattern.shape(x.shape) for name, x in layers.items()}


def room_in(masks: Masks, layers: Mapping[str, Layer]) -> dict[str, int]:
    """How many more weights may become active in every layer: as many as are inactive, fewer where a pattern limits."""
    return {n: max(0, distribution.capacity(shape) - count(masks[n])) for n, shape in shapes_of(layers).items()}


def total_of(layers: Mapping[str, Layer]) -> int:
    """The number of weights in all layers, active or not."""
    return sum(prod(layer.shape) for layer in layers.values())
