"""Magnitude pruning of a trained layer: the weights of largest absolute value stay."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from granet.pruning import best


@dataclass(frozen=True)
class Magnitude:
    """Keep a layer's largest absolute weights. It needs no calibration data."""

    calibrated: ClassVar[bool] = False

    def prune(self, weight: Tensor, moment: Tensor | None, n: int, pattern) -> Tensor:
        """Returns the pruned weight, a copy.

        Args:
            weight: of shape (outputs, inputs).
            moment: not used.
            n: how many weights stay.
            pattern: the `granet.pattern.NM` that decides instead of `n`, or None.
        """
        scores = weight.abs()
        mask = best.of_matrix(scores, n) if pattern is None else best.of_groups(scores, pattern)
        return weight.where(mask, 0)
