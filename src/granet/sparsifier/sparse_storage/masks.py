"""Masks of layers in sparse storage, which the positions of their values say: made when somebody looks at them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from math import prod

import torch
from torch import Tensor

from granet.sparsifier.sparse_storage.values import PIECE


class Masks(Mapping[str, Tensor]):
    """Masks by name; those of layers in sparse storage take no memory, and are a new tensor whenever they are read.

    Args:
        held: the masks, in their order.
        made: the positions and the dense shape of the layers whose masks are made from these.
    """

    def __init__(self, held: Mapping[str, Tensor], made: Mapping[str, tuple[Tensor, tuple[int, ...]]]):
        self._all: dict[str, Tensor | tuple] = {name: made[name] if name in made else held[name] for name in held}

    def __getitem__(self, name: str) -> Tensor:
        found = self._all[name]
        if isinstance(found, Tensor):
            return found
        positions, shape = found
        mask = torch.zeros(prod(shape), dtype=torch.bool, device=positions.device)
        for piece in positions.split(PIECE):
            mask.index_fill_(0, piece.long(), True)
        return mask.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __deepcopy__(self, memo: dict) -> Masks:
        other = memo[id(self)] = object.__new__(Masks)
        other._all = deepcopy(self._all, memo)
        return other

    def __reduce__(self) -> tuple:
        return OrderedDict, (list(self.items()),)  # as a plain dict, which loads where granet is not installed

    def __repr__(self) -> str:
        return f"Masks({', '.join(self._all)})"
