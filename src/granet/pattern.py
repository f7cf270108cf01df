"""Patterns: which masks are allowed, so that hardware can make use of them.

- `"unstructured"`: any mask.
- `"N:M"`, such as `"2:4"`: at most N of every M consecutive inputs of an output are active.
- `"RxC"`, such as `"4x1"` or `"16x16"`: weights come and go in blocks of R consecutive outputs by C consecutive inputs.
- `"channel"`: whole outputs come and go, rows of a linear layer or filters of a convolution.

Outputs are a weight's first dimension, inputs its second; each position of a convolution's kernel stands for itself.

Blocks and channels are units. A method sees a layer with one entry for each of them, the mean of the absolute weights
and gradients in it with the sign of their sum, and the masks that it gives back are spread over the weights: sparsities
and budgets are of units.
N:M keeps single weights and changes the order in which `granet.topology` chooses among them: those that leave their
group legal come first, by score, then the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf, isfinite
from typing import TYPE_CHECKING, ClassVar

from granet import distribution, topology
from granet.names import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from granet.criterion import Criterion, Layer
    from granet.methods.base import Method


@dataclass(frozen=True)
class Pattern:
    """Every mask is allowed; the base of the other patterns."""

    unit: ClassVar[str] = "weights"  # what is active or not as a whole, and what budgets count
    pools: ClassVar[bool] = False  # whether a unit is more than one weight
    spares_last: ClassVar[bool] = False  # whether the model's last layer stays dense unless it is asked for by name

    def __str__(self) -> str:
        return "unstructured"

    @property
    def order(self) -> NM | None:
        """What orders the entries that `granet.topology` chooses among; None: their scores alone."""
        return None

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot obey; None if it can."""
        return None

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in units of a weight of this shape, as methods and distributions see it."""
        return tuple(shape)

    def pooled(self, layer: Layer) -> Layer:
        """The layer with one entry for each unit."""
        return layer

    def pooled_mask(self, mask: Tensor) -> Tensor:
        """The units that are active in a mask of weights."""
        return mask

    def expanded(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of weights, of the given shape, in which these units are active."""
        return mask

    def obeyed(self, mask: Tensor) -> bool:
        """Whether a mask of weights is allowed."""
        return True

    def policy(self, method: Method) -> Method | Patterned:
        """What asks `method` for masks so that they obey."""
        return method

    def refuse(self, method: Method, shapes: distribution.Shapes) -> None:
        """Rejects a method that cannot obey in layers of these shapes, in units.

        Raises:
            ValueError: says why, and what would do.
        """


@dataclass(frozen=True)
class Patterned:
    """A method that is asked about units, and whose choices obey the pattern."""

    pattern: Pattern
    method: Method

    def init(self, layers: Mapping[str, Layer], rng: torch.Generator, *probe) -> dict[str, Tensor]:
        """The masks of weights to start from."""
        with topology.obeying(self.pattern.order):
            units = self.method.init(self._pooled(layers), rng, *probe)
        masks = {name: self.pattern.expanded(units[name], layer.shape) for name, layer in layers.items()}
        found = self.method.sparsity_at(0) is None  # the method takes the masks as it finds them
        wrong = [name for name, mask in masks.items() if found and not self.pattern.obeyed(mask)]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} does not obey pattern {self.pattern}, "
                f"and {type(self.method).__name__} leaves it as it is"
            )
        return masks

    def update(
        self, step: int, layers: Mapping[str, Layer], masks: Mapping[str, Tensor], rng: torch.Generator, *memory
    ) -> dict[str, Tensor]:
        """The masks of weights after optimizer step `step`."""
        before = {name: self.pattern.pooled_mask(mask) for name, mask in masks.items()}
        with topology.obeying(self.pattern.order):
            after = self.method.update(step, self._pooled(layers), before, rng, *memory)
        return {
            name: mask if after[name] is before[name] else self.pattern.expanded(after[name], mask.shape)
            for name, mask in masks.items()
        }

    def _pooled(self, layers):
        return {name: self.pattern.pooled(layer) for name, layer in layers.items()}


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` of every `m` consecutive inputs are active, for each output and kernel position by itself.

    A group that has more, where a method starts denser than that, loses its entries beyond the best `n` before any
    legal entry goes, and gains none.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def order(self):
        return self

    def misfit(self, shape):
        if len(shape) < 2 or shape[1] % self.m:
            inputs = shape[1] if len(shape) > 1 else "no"
            return f"its {inputs} inputs are not a multiple of {self.m}"
        return None

    def shape(self, shape):
        return distribution.Limited(shape, Fraction(self.n, self.m))

    def obeyed(self, mask):
        return bool((self._counts(mask) <= self.n).all())

    def policy(self, method):
        return Patterned(self, method)

    def refuse(self, method, shapes):
        if method.reparameterizes or method.explores is not None:
            raise _unable(method, self)
        final = method.final_counts(shapes)
        if final is None:
            return
        most = {name: distribution.capacity(shape) for name, shape in shapes.items()}
        if not isinstance(final, dict):
            final, most = {"the network": final}, {"the network": sum(most.values())}
        over = next((name for name in final if final[name] > most[name]), None)
        if over is not None:
            raise ValueError(
                f"{method!r} ends with {final[over]:,} active weights in {over}, and pattern {self} allows "
                f"{most[over]:,}: choose a sparsity of {1 - self.n / self.m:.4g} or more, or another pattern"
            )

    def top(
        self,
        layers: Sequence[Layer],
        criterion: Criterion,
        n: int,
        among: Sequence[Tensor],
        beside: Sequence[tuple[Tensor, Tensor]] | None,
    ) -> list[Tensor]:
        """`granet.topology.top`, with the entries first that leave their group with at most `n`.

        Args:
            layers: the layers whose entries compete.
            criterion: gives each entry its score.
            n: how many entries to select.
            among: for each layer a mask of the candidates.
            beside: for each layer what is active beside the choice, and what was active before the update, which a
                group may have again; None where nothing is.
        """
        active = [None] * len(layers) if beside is None else beside
        tiers = [self._tiers(criterion(x), mask, pair) for x, mask, pair in zip(layers, among, active, strict=True)]
        chosen = [mask.new_zeros(mask.shape) for mask in among]
        for tier in zip(*tiers, strict=True):
            size = sum(topology.count(mask) for mask in tier)
            take = min(n, size)
            best = topology.top(layers, criterion, take, tier, candidates=size)
            chosen = [a.logical_or_(b) for a, b in zip(chosen, best, strict=True)]
            n -= take
        return chosen

    def _tiers(self, scores: Tensor, among: Tensor, beside: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """The candidates that are legal, those that their group had before, and the rest."""
        low, high = scores.aminmax()
        if not (isfinite(low) and isfinite(high)):
            raise topology.NonFiniteScores("a score is NaN or infinite, so no group can be ordered")
        rank = self._ranks(scores.where(among, -inf))
        if beside is None:
            rooms = [self.n]
        else:
            held, had = (self._counts(mask) for mask in beside)
            rooms = [self.n - held, had.clamp(min=self.n) - held]
        tiers, rest = [], among
        for room in rooms:
            fits = (rank < room).movedim(0, 2).reshape(among.shape)
            tiers.append(fits.logical_and_(rest))
            rest = rest & ~tiers[-1]
        return [*tiers, rest]

    def _grouped(self, values: Tensor) -> Tensor:
        """The members of all groups, the first of each, then the second of each and so on, each lot in one piece."""
        return values.unflatten(1, (-1, self.m)).movedim(2, 0).contiguous()

    def _ranks(self, scores: Tensor) -> Tensor:
        """The rank of each entry in its group, 0 for the highest score, the earlier of equal ones first; grouped."""
        import torch

        members = self._grouped(scores)
        places = torch.arange(
            self.m, dtype=self._dtype, device=scores.device
        )  # start as if earlier entries scored higher
        ranks = places.view(-1, *[1] * (members.ndim - 1)).expand(members.shape).clone()
        for k in range(self.m):
            for later in range(k + 1, self.m):
                higher = (members[later] > members[k]).to(self._dtype)
                ranks[k] += higher
                ranks[later] -= higher
        return ranks

    def _counts(self, mask: Tensor) -> Tensor:
        """How many of each group are active."""
        return self._grouped(mask).sum(0, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """The smallest integers that count to M."""
        import torch

        return torch.int8 if self.m < 128 else torch.int16


@dataclass(frozen=True)
class Pooled(Pattern):
    """Units of several weights, which are active or not together."""

    pools: ClassVar[bool] = True

    def obeyed(self, mask):
        return bool((self.expanded(self.pooled_mask(mask), mask.shape) == mask).all())

    def policy(self, method):
        return Patterned(self, method)

    def refuse(self, method, shapes):
        if method.needs_probe or method.drifts or method.reparameterizes or method.explores is not None:
            raise _unable(method, self)

    def pooled(self, layer):
        from granet.criterion import Layer  # imports torch, which recipes do without

        grad = layer.grad
        return Layer(self._mean(layer.weight), None if grad is None else self._mean(grad))

    def _mean(self, values: Tensor) -> Tensor:
        """The mean of the absolute values of each unit, with the sign of their sum, in float32 at least."""
        members, dims = self._members(values.detach())
        members = members if members.element_size() == 8 else members.float()
        return members.abs().mean(dims).copysign(members.sum(dims))

    def _members(self, values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """A view of the values and its dimensions along which the members of a unit lie."""
        raise NotImplementedError


@dataclass(frozen=True)
class Block(Pooled):
    """Blocks of `rows` consecutive outputs by `columns` consecutive inputs, at each kernel position by itself."""

    rows: int
    columns: int

    unit: ClassVar[str] = "blocks"

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def misfit(self, shape):
        if len(shape) < 2 or shape[0] % self.rows or shape[1] % self.columns:
            given = f"{shape[0]} outputs by {shape[1]} inputs" if len(shape) > 1 else f"a vector of {shape[0]}"
            return f"{given} are not made of blocks of {self.rows} by {self.columns}"
        return None

    def shape(self, shape):
        return shape[0] // self.rows, shape[1] // self.columns, *shape[2:]

    def pooled_mask(self, mask):
        return mask[:: self.rows, :: self.columns].contiguous()

    def expanded(self, mask, shape):
        return mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def _members(self, values):
        return values.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows)), (1, 3)


@dataclass(frozen=True)
class Channel(Pooled):
    """Whole outputs: all weights of an index of the first dimension."""

    unit: ClassVar[str] = "channels"
    spares_last: ClassVar[bool] = True

    def __str__(self) -> str:
        return "channel"

    def shape(self, shape):
        return (shape[0],)

    def pooled_mask(self, mask):
        return mask.flatten(1)[:, 0].contiguous()

    def expanded(self, mask, shape):
        return mask.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()

    def _members(self, values):
        return values.flatten(1), (1,)


def parse(text: str | Pattern | None) -> Pattern:
    """The pattern that `text` names; None is "unstructured".

    Raises:
        ValueError: it names none; the message says what there is.

    >>> parse("2:4"), str(parse("16x16")), str(parse(None))
    (NM(n=2, m=4), '16x16', 'unstructured')
    """
    if isinstance(text, Pattern):
        return text
    text = "unstructured" if text is None else str(text)
    if match := re.fullmatch(r"(\d+)([:x])(\d+)", text):
        a, b = int(match[1]), int(match[3])
        if match[2] == ":" and 0 < a < b:
            return NM(a, b)
        if match[2] == "x" and a and b:
            return Block(a, b)
    if text in _PLAIN:
        return _PLAIN[text]
    raise ValueError(
        f"there is no pattern {text!r}: choose 'unstructured', 'N:M' with 0 < N < M such as '2:4', "
        "'RxC' with R outputs by C inputs such as '4x1' or '16x16', or 'channel'"
        + did_you_mean(text, [*_PLAIN, "2:4", "1:4", "4x1", "16x16"])
    )


_PLAIN: dict[str, Pattern] = {"unstructured": Pattern(), "channel": Channel()}


def _unable(method: Method, pattern: Pattern) -> ValueError:
    return ValueError(
        f"{type(method).__name__} decides about single weights in its own way and cannot obey pattern {pattern}: "
        "choose pattern 'unstructured' or another method"
    )
