"""Channels of activations: which belong together, and what those emit that do not depend on the input.

`Units` joins channels that can be removed only together, as an addition joins those of its terms. `Channels` is what a
walk through the network knows of one activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """The channels of one activation.

    Attributes:
        axis: the axis of the activation that they lie on.
        ids: int64, one number for each place on that axis; a channel that was flattened has several places.
        values: float64, what each place holds if that does not depend on the input, otherwise NaN.
    """

    axis: int
    ids: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def varying(self) -> Tensor:
        """Where the value depends on the input."""
        return self.values.isnan()

    def at(self, axis: int) -> Channels:
        """Returns the same channels on another axis."""
        return replace(self, axis=axis)

    def with_values(self, values: Tensor) -> Channels:
        """Returns the same channels with other values, where they are constant."""
        return replace(self, values=values.double().masked_fill(self.varying, torch.nan))

    def zeros_only(self) -> Channels:
        """Returns the same channels, of which only those that are zero count as constant."""
        return replace(self, values=self.values.masked_fill(self.values != 0, torch.nan))

    def agreeing_with(self, other: Channels) -> Channels:
        """Returns the same channels, of which only those that hold the same in `other` count as constant."""
        return replace(self, values=self.values.masked_fill(self.values != other.values, torch.nan))

    def repeated(self, times: int) -> Channels:
        """Returns the channels with several places for each, one after the other."""
        return replace(self, ids=self.ids.repeat_interleave(times), values=self.values.repeat_interleave(times))


class Units:
    """Sets of channels that are removed together or not at all (union-find)."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._pinned: set[int] = set()

    def new(self, count: int) -> Tensor:
        """Returns `count` new channels, each a unit of its own."""
        start = len(self._parents)
        self._parents += range(start, start + count)
        return torch.arange(start, start + count)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Puts the channels at equal places of two lists into one unit each."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self._find(a)] = self._find(b)

    def pin(self, ids: Tensor) -> None:
        """Keeps these channels, whatever they hold."""
        self._pinned.update(ids.tolist())

    def roots(self) -> Tensor:
        """Returns the number of each channel's unit."""
        return torch.tensor([self._find(i) for i in range(len(self._parents))], dtype=torch.int64)

    def pinned(self) -> Tensor:
        """Returns which units are kept anyway, by their number."""
        found = torch.zeros(len(self._parents), dtype=torch.bool)
        for i in self._pinned:
            found[self._find(i)] = True
        return found

    def _find(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i
