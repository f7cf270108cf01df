"""New numbers for channels, so that active weights share words.

At reduced precision a word of weights (two or four neighbouring input channels) is stored and multiplied if any of them
is active. The channels between two layers may be numbered in any order, if the layers before and after agree on it. So
channels whose weights are active at the same places get numbers in the same word, which leaves fewer words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from granet.engine.steps import Convolution, Input, Segment, Value

MOST_CHANNELS = 4096  # of which all pairs are compared; more keep their numbers
LEAST_GAIN = 0.01  # the share of words that must go


def renumbered(segment: Segment, per_word: int) -> dict[Value, Tensor]:
    """Returns, for each value whose channels get new numbers, the old number of each new channel.

    Channels keep their numbers in the inputs and outputs of the segment, at grouped layers, and where fewer than 1 % of
    the words would go.

    Args:
        segment: the steps, in float32.
        per_word: the channels in a word.
    """
    orders: dict[Value, Tensor] = {}
    for values in _free(segment):
        readers = [s for s in segment.layers if s.inputs[0] in values and s.spec.groups == 1]
        channels = next(iter(values)).channels
        if not readers or channels % per_word or not per_word < channels <= MOST_CHANNELS:
            continue
        active = torch.cat([_columns(layer) for layer in readers])
        order = grouped(active, per_word)
        if words(active[:, order], per_word) <= (1 - LEAST_GAIN) * words(active, per_word):
            orders |= dict.fromkeys(values, order)
    return orders


def weight_of(layer: Convolution, orders: Mapping[Value, Tensor]) -> Tensor:
    """Returns a layer's weight with its channels renumbered."""
    weight = layer.weight
    if layer.out in orders:
        weight = weight[orders[layer.out]]
    if layer.inputs[0] in orders and layer.spec.groups == 1:
        weight = weight[:, orders[layer.inputs[0]]]
    return weight


def bias_of(layer: Convolution, orders: Mapping[Value, Tensor]) -> Tensor | None:
    """Returns a layer's bias with its channels renumbered."""
    return layer.bias if layer.bias is None or layer.out not in orders else layer.bias[orders[layer.out]]


def fill(layers: Iterable[Convolution], orders: Mapping[Value, Tensor], per_word: int) -> float:
    """Returns the share of active weights in the words of these layers. Words of grouped layers are not counted."""
    active = stored = 0
    for layer in layers:
        if layer.spec.groups == 1:
            weight = weight_of(layer, orders)
            short = -weight.shape[1] % per_word
            columns = torch.nn.functional.pad(_columns(layer, weight), (0, short))
            active += int(columns.sum())
            stored += per_word * words(columns, per_word)
    return active / stored if stored else 1.0


def words(active: Tensor, per_word: int) -> int:
    """Returns how many words a matrix needs, of which a row is one output channel and kernel position."""
    return int(active.unflatten(1, (-1, per_word)).any(dim=2).sum())


def grouped(active: Tensor, size: int) -> Tensor:
    """Returns an order of columns in which each `size` neighbours are active in the same rows as far as possible.

    Columns are paired by the number of rows in which both are active, the largest first; then the pairs likewise.

    Args:
        active: a bool matrix whose number of columns is a multiple of `size`.
        size: a power of two.
    """
    members = torch.arange(active.shape[1])[:, None]
    merged = active.float()
    while members.shape[1] < size:
        if merged.shape[1] % 2:
            raise ValueError(f"{active.shape[1]} columns cannot form groups of {size}")
        first, second = _pairs(merged.T @ merged)
        members = torch.cat([members[first], members[second]], dim=1)
        merged = torch.maximum(merged[:, first], merged[:, second])
    return members.reshape(-1)


def _pairs(shared: Tensor) -> tuple[Tensor, Tensor]:
    """Returns pairs of all columns: of those that are left, the two that share most, then the next two, and so on."""
    count = len(shared)
    shared = shared.fill_diagonal_(-1.0)
    left = torch.ones(count, dtype=torch.bool)
    first: list[Tensor] = []
    second: list[Tensor] = []
    while left.any():
        most, partner = shared.max(dim=1)
        mutual = left & (partner[partner] == torch.arange(count)) & (torch.arange(count) < partner)
        if not mutual.any():  # columns that share equally much may each prefer another one
            i = int(most.argmax())
            mutual = torch.arange(count) == i
        pair = mutual.nonzero().flatten()
        first.append(pair)
        second.append(partner[pair])
        taken = torch.cat([pair, partner[pair]])
        left[taken] = False
        shared[taken] = -1.0
        shared[:, taken] = -1.0
    order = torch.cat(first).argsort()
    return torch.cat(first)[order], torch.cat(second)[order]


def _columns(layer: Convolution, weight: Tensor | None = None) -> Tensor:
    """Returns where a weight is active, as a matrix of one row per output channel and kernel position."""
    weight = layer.weight if weight is None else weight
    return (weight != 0).movedim(1, -1).reshape(-1, weight.shape[1])


def _free(segment: Segment) -> list[set[Value]]:
    """Returns the sets of values that must number their channels alike, and may number them anew."""
    parent: dict[Value, Value] = {}

    def root(value: Value) -> Value:
        while parent.setdefault(value, value) is not value:
            value = parent[value]
        return value

    fixed = set(segment.outputs)
    for step in segment.steps:
        alike = step.inputs
        root(step.out)
        if isinstance(step, Input):
            fixed.add(step.out)
        elif isinstance(step, Convolution):
            spec, source = step.spec, step.inputs[0]
            depthwise = spec.groups == spec.in_channels == spec.out_channels
            if spec.groups > 1 and not depthwise:
                fixed |= {source, step.out}
            if not depthwise:
                alike = step.inputs[1:]
        for value in alike:
            parent[root(value)] = root(step.out)
    classes: dict[Value, set[Value]] = {}
    for value in list(parent):
        classes.setdefault(root(value), set()).add(value)
    bound = {root(value) for value in fixed}
    return [values for top, values in classes.items() if top not in bound]
