"""A network for the tests of patterns, and what a legal mask is."""

import numpy as np
import torch
from torch import nn

from granet.pattern import NM, Block, Channel, parse


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 8),
    )


def group_counts(mask, m):
    """How many of each m consecutive inputs are active, by loops."""
    array = np.moveaxis(mask.numpy().reshape(*mask.shape[:2], -1), 1, -1)
    return [int(row[i : i + m].sum()) for rows in array for row in rows for i in range(0, len(row), m)]


def is_legal(mask, pattern):
    """Whether a mask obeys, by loops over its entries."""
    array = mask.numpy()
    match parse(pattern):
        case NM(n, m):
            return max(group_counts(mask, m)) <= n
        case Block(r, c):
            return all(
                array[i - i % r, j - j % c, *rest] == array[i, j, *rest] for i, j, *rest in np.ndindex(array.shape)
            )
        case Channel():
            return all(row.all() or not row.any() for row in array)
