"""The comparison of a written file with the model: both compute the same inputs, and the largest deviation counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from granet.export.network import ExportError, Network
from granet.text import si

BOUNDS = {"float32": 1e-4, "int8": 0.25}  # the largest deviation allowed, as a share of the largest output

Runner = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]


def bound_of(precision: str, tolerance: float | None) -> float:
    """Returns the largest deviation that is allowed, as a share of the largest output.

    Raises:
        ValueError: there is no such precision, or the tolerance is no number above 0.
    """
    if precision not in BOUNDS:
        raise ValueError(f"precision={precision!r} is not possible; {' and '.join(map(repr, BOUNDS))} are")
    if tolerance is None:
        return BOUNDS[precision]
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance={tolerance} must be a number above 0: a share of the largest output")
    return tolerance


@dataclass(frozen=True)
class Comparison:
    """How far a file's outputs are from those of the model.

    Attributes:
        deviation: the largest absolute difference, divided by the largest absolute output of the model.
        examples: the number of inputs compared.
        accuracy: the shares of inputs that the model and the file classify correctly; None without labels.
    """

    deviation: float
    examples: int
    accuracy: tuple[float, float] | None = None


@dataclass(frozen=True)
class Export:
    """A file that was written, and how it compares with the model. `str()` says it in a few lines.

    Attributes:
        path: the file.
        format: its format, a name in `FORMATS`.
        precision: the precision of its weights, and with int8 of its activations.
        nbytes: its size, with the files that belong to it.
        bound: the largest deviation that was allowed.
        comparison: None where the format cannot be run on this machine.
        note: what was checked instead or besides, empty if there is nothing to say.
    """

    path: Path
    format: str
    precision: str
    nbytes: int
    bound: float
    comparison: Comparison | None
    note: str = ""

    @property
    def deviation(self) -> float | None:
        """The largest deviation as a share of the largest output; None where the file cannot be run here."""
        return self.comparison.deviation if self.comparison else None

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}, {self.precision}, {si(self.nbytes)}B"]
        if self.comparison is not None:
            found = self.comparison
            lines.append(
                f"largest deviation from the model on {found.examples:,} inputs: {found.deviation:.2g} of the largest "
                f"output (allowed: {self.bound:.2g})"
            )
            if found.accuracy is not None:
                lines.append(f"accuracy on them: model {found.accuracy[0]:.2%}, file {found.accuracy[1]:.2%}")
        return "\n".join([*lines, self.note] if self.note else lines)


def tensors(outputs: object) -> list[Tensor]:
    """Returns the tensors in a model's outputs, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def compare(network: Network, run: Runner, inputs: Iterable[object] | None, bound: float) -> Comparison:
    """Returns how far `run`, which computes with the file, is from the model on `inputs`.

    Without inputs it is the example, as a whole and its first entry alone.

    A batch of `inputs` is a tensor or a tuple of arguments. What follows the arguments is left out, except for a vector
    of whole numbers, the labels of the batch, which is used for the accuracy.

    Raises:
        ExportError: the deviation is larger than `bound`, or either side's outputs are not finite.
    """
    if inputs is None:
        inputs = [network.example, tuple(one[:1] for one in network.example)]
    elif isinstance(inputs, Tensor):
        inputs = [inputs]
    largest = difference = 0.0
    examples = labelled = 0
    correct = torch.zeros(2, dtype=torch.int64)
    for batch in inputs:
        arguments, labels = network.arguments(batch)
        expected = tensors(network(arguments))
        found = list(run(arguments))
        shapes = [tuple(one.shape) for one in expected], [tuple(one.shape) for one in found]
        if shapes[0] != shapes[1]:
            raise ExportError(f"the file's outputs have shapes {shapes[1]}, those of the model {shapes[0]}")
        for a, b in zip(expected, found, strict=True):
            if not a.isfinite().all():
                raise ExportError("the model's own outputs hold NaN or infinite values on these inputs")
            largest = max(largest, a.double().abs().max().item() if a.numel() else 0.0)
            gap = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
            difference = gap if gap != gap else max(difference, gap)
            if difference != difference:
                raise ExportError("the file's outputs hold NaN on inputs where those of the model are finite")
        examples += len(arguments[0])
        if labels is not None and expected[0].dim() == 2:
            labelled += len(labels)
            correct += torch.stack([(one.argmax(dim=1) == labels).sum() for one in (expected[0], found[0])])
    if not examples:
        raise ValueError("there are no inputs to compare the file on: give at least one batch")
    deviation = difference / largest if largest else difference
    accuracy = tuple((correct / labelled).tolist()) if labelled else None
    result = Comparison(deviation, examples, accuracy)
    if deviation > bound:
        raise ExportError(
            f"the file's outputs deviate from the model's by {deviation:.2g} of the largest output on {examples:,} "
            f"inputs, and {bound:.2g} is allowed: no file is left; a larger tolerance keeps it"
        )
    return result
