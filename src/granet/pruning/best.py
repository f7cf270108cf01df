"""Which entries of a matrix of scores are best: exact counts, and of equal scores the earlier ones."""

import torch
from torch import Tensor

from granet import topology
from granet.criterion import Layer, own_values
from granet.pattern import NM


def of_matrix(scores: Tensor, n: int) -> Tensor:
    """The mask of the `n` highest scores of the whole matrix.

    >>> of_matrix(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 3).tolist()
    [[True, True], [False, True]]
    """
    return topology.top([Layer(scores)], own_values, n, [torch.ones_like(scores, dtype=torch.bool)])[0]


def of_rows(scores: Tensor, n: int) -> Tensor:
    """The mask of the highest scores of each row, equally many in all; the first `n % rows` rows keep one more.

    >>> of_rows(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 3).tolist()
    [[True, True], [True, False]]
    """
    each, more = divmod(n, len(scores))
    counts = each + (torch.arange(len(scores), device=scores.device) < more).long()
    return _ranks(scores) < counts.unsqueeze(1)


def of_groups(scores: Tensor, pattern: NM) -> Tensor:
    """The mask of the `pattern.n` highest scores of every `pattern.m` consecutive entries of a row.

    >>> of_groups(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), NM(2, 4)).tolist()
    [[True, False, False, True]]
    """
    return (_ranks(scores.unflatten(1, (-1, pattern.m))) < pattern.n).flatten(1)


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each entry along the last dimension, 0 for the highest."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
