"""Calibration batches, cut to the size of the inputs that a model is compiled for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from granet.names import described

PIECES = 64  # calls on calibration data at most

Call = tuple[tuple, dict]


def calls(batches: Iterable[object], inputs: Sequence[object], named: Mapping[str, object]) -> list[Call]:
    """Returns the arguments of calls on calibration data, each of the example's shape.

    A batch is a tensor, a tuple or list of positional arguments, of which further ones such as targets are left out, or
    a mapping of keyword arguments. It is cut along the first axis; what is left of it is not used.

    Raises:
        ValueError: if there are none, or one of another shape.
    """
    if isinstance(batches, Tensor):
        batches = [batches]
    found: list[Call] = []
    for batch in batches:
        for call in _pieces(batch, tuple(inputs), dict(named)):
            found.append(call)
            if len(found) == PIECES:
                return found
    if not found:
        raise ValueError("there is no calibration data: give at least one batch as large as the example inputs")
    return found


def _pieces(batch: object, inputs: tuple, named: dict) -> Iterator[Call]:
    if isinstance(batch, Mapping):
        given: Call = inputs, {name: batch.get(name, value) for name, value in named.items()}
    elif isinstance(batch, Tensor):
        given = (batch, *inputs[1:]), named
    elif isinstance(batch, list | tuple) and len(batch) >= len(inputs):
        given = tuple(batch[: len(inputs)]), named
    else:
        raise ValueError(
            f"a calibration batch is {described(batch)}, and the model takes {len(inputs)} positional and "
            f"{len(named)} named inputs: give a tensor, a tuple or list of these, or a mapping"
        )
    leaves, form = tree_flatten((inputs, named))
    offered, other = tree_flatten(given)
    if form != other:
        raise ValueError("a calibration batch has another structure than the example inputs")
    count = None
    for example, tensor in zip(leaves, offered, strict=True):
        if not isinstance(example, Tensor):
            continue
        if not isinstance(tensor, Tensor) or tensor.shape[1:] != example.shape[1:] or tensor.dtype != example.dtype:
            raise ValueError(
                f"a calibration batch holds {_shape(tensor)}, and the example inputs have {_shape(example)} there: "
                "only the first axis may differ"
            )
        if example.dim() and tensor is not example:
            pieces = len(tensor) // max(1, len(example))
            count = pieces if count is None else min(count, pieces)
    for i in range(count or 0):
        cut = [
            given[i * len(example) : (i + 1) * len(example)]
            if isinstance(example, Tensor) and example.dim() and given is not example
            else given
            for example, given in zip(leaves, offered, strict=True)
        ]
        yield tree_unflatten(cut, form)


def _shape(value: object) -> str:
    return f"{'x'.join(map(str, value.shape))} of {value.dtype}" if isinstance(value, Tensor) else described(value)


def check_finite(data: Sequence[Call]) -> None:
    """Raises a ValueError if calibration data holds NaN or infinite values."""
    for leaf in tree_flatten(list(data))[0]:
        if isinstance(leaf, Tensor) and not leaf.isfinite().all():
            raise ValueError("the calibration data holds NaN or infinite values, which int8 cannot represent")
