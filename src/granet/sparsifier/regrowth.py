"""Optimizer buffers of weights that have just become active.

A grown weight has no past, and zero is not the same as none. An Adam whose second moment is zero while its step count
is large takes the weight's first gradient for an enormous one: the first move is (1 - beta1) / sqrt(1 - beta2) = 3.2
learning rates, that of RMSprop 10. A step size of zero keeps Rprop from moving the weight at all. So what an optimizer
knows about directions starts from zero, and what it knows about sizes from the layer's weights and from the gradient
that made the weight grow, so that the first move is that of a fresh optimizer: about one learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum

import torch
from torch import Tensor
from torch.optim import Optimizer

from granet import shards
from granet.sparsifier import quantised
from granet.topology import count


class Start(Enum):
    """What a buffer holds of a weight that has just become active."""

    ZERO = "zero"
    MEAN = "the mean over the weights of the layer that were active before"
    SQUARE = "that mean, more where the weight's own gradient is larger than theirs, for a first move of one rate"
    SIZE = "the same for what is no square"
    RATE = "the learning rate of its parameter group"


STARTS = {
    # directions, and averages of the weights, which were zero
    "momentum_buffer": Start.ZERO,  # SGD, RMSprop, Muon
    "exp_avg": Start.ZERO,  # Adam and its relatives, Lion
    "grad_avg": Start.ZERO,  # RMSprop, centered
    "prev": Start.ZERO,  # Rprop
    "ax": Start.ZERO,  # ASGD
    # sizes of gradients
    "exp_avg_sq": Start.SQUARE,  # Adam and its relatives
    "max_exp_avg_sq": Start.SQUARE,  # AMSGrad
    "square_avg": Start.SQUARE,  # RMSprop, Adadelta
    "sum": Start.SQUARE,  # Adagrad
    "variance": Start.SQUARE,  # Adafactor
    "state2": Start.SQUARE,  # Adam and its relatives in bitsandbytes
    "exp_inf": Start.SIZE,  # Adamax
    # sizes of steps
    "acc_delta": Start.MEAN,  # Adadelta
    "step_size": Start.RATE,  # Rprop
}
"""By the name of the buffer. One of another name gets the mean if none of its optimizer's is negative, else zero."""


@torch.no_grad()
def warm(
    optimizers: Iterable[Optimizer],
    parameters: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> None:
    """Give each weight that is in the masks `new` and not in `old` its place in the optimizers' buffers.

    Buffers of any other shape than the weight's (step counts, factored moments) stay as they are, and so do codes of
    numbers without the scales that belong to them. With shards, all ranks must call this together, and get what one
    process would get.

    Args:
        optimizers: they hold the parameters. Their buffers are changed in place.
        parameters: by name, as are the masks.
        old: the masks before the update.
        new: the masks after it.
        gradients: the dense gradients by which weights were grown, where a method looks at them.
    """
    starts = Starts()
    for name, mask in new.items():
        grown = mask > old[name]
        if not count(grown):
            continue
        n, ratio, grown = count(old[name]), ratio_of(gradients.get(name), old[name]), shards.local(grown)
        for optimizer, group, key, buffer in buffers_of(optimizers, parameters[name]):
            value = starts.of(optimizer, group, key, buffer, n, ratio)
            if value is not None:
                numbers = quantised.numbers(shards.local(buffer))
                quantised.put(shards.local(buffer), torch.where(grown, value, numbers))


class Starts:
    """What the buffers of optimizers hold of weights that have just become active."""

    def __init__(self):
        self._signed: dict[tuple[int, str], bool] = {}

    def of(
        self, optimizer: Optimizer, group: Mapping, key: str, buffer, n: int, ratio: Tensor | float
    ) -> Tensor | None:
        """Returns the numbers, of the shape of `ratio`; None where they are zero, or cannot be told.

        Args:
            optimizer: what has the buffer.
            group: the parameter group of the buffer's parameter.
            key: the name of the buffer.
            buffer: it, as it was before weights were grown: zero where they were inactive.
            n: how many of its numbers belonged to active weights.
            ratio: see `ratio_of`.
        """
        start = STARTS.get(key)
        if start is None:
            if (id(optimizer), key) not in self._signed:
                self._signed[id(optimizer), key] = _is_signed(optimizer, key)
            start = Start.ZERO if self._signed[id(optimizer), key] else Start.MEAN
        numbers = None if start is Start.ZERO else quantised.numbers(shards.local(buffer))
        if numbers is None:
            return None
        if start is Start.RATE:
            return numbers.new_full((), float(group["lr"]))
        power = {Start.MEAN: 0, Start.SIZE: 1, Start.SQUARE: 2}[start]
        return numbers.new_full((), _total(numbers, buffer) / n) * (ratio * _part(group)) ** power


def buffers_of(optimizers: Iterable[Optimizer], parameter: Tensor) -> Iterator[tuple]:
    """Each buffer of the parameter's shape that holds numbers, with its optimizer, parameter group and name."""
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype != torch.bool:
                yield optimizer, group, key, quantised.found(key, value, state)


def _part(group: Mapping) -> float:
    """The part that a weight's first gradient has in its first move: the rest would come from earlier ones.

    Adam and its relatives keep 1 - beta1 of it in the first moment, which starts from zero. To divide by the size of
    gradients as it is would make the first moves ten times shorter than those of a fresh Adam. NAdam looks ahead.
    """
    return 1.0 if "momentum_decay" in group else 1.0 - float(group.get("betas", (0.0,))[0])


def ratio_of(grad: Tensor | None, active: Tensor) -> Tensor | float:
    """Returns each gradient's size over the root mean square of those of active weights: at least 1; 1 if unknown."""
    if grad is None:
        return 1.0
    squares = grad.to(torch.promote_types(grad.dtype, torch.float32)).square()
    usual = shards.total(squares.masked_fill(active.logical_not(), 0)) / count(active)
    return ratio_to(shards.local(squares), usual)


def ratio_to(squares: Tensor, usual: float) -> Tensor | float:
    """The same from squared gradients and the mean square of those of active weights."""
    return squares.div(usual).sqrt().clamp(min=1) if 0 < usual < float("inf") else 1.0


def _total(numbers: Tensor, buffer: Tensor) -> float:
    """The sum of a buffer's numbers, those of other ranks included."""
    return shards.total(shards.like(numbers, buffer) if shards.is_sharded(buffer) else numbers)


def _is_signed(optimizer: Optimizer, key: str) -> bool:
    """Whether the buffer of that name is negative anywhere: one layer alone may happen to be positive throughout."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for _, _, name, buffer in buffers_of([optimizer], p):
                if name != key:
                    continue
                found = bool((quantised.numbers(shards.local(buffer)) < 0).any())
                if shards.anywhere(found, buffer) if shards.is_sharded(buffer) else found:
                    return True
    return False
