"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, https://arxiv.org/abs/2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from granet.pruning import best


def scores(weight: Tensor, moment: Tensor) -> Tensor:
    """The score of each weight, `|W_ij| * ||X_j||` (Eq. 1), where `X_j` is input `j` over all calibration tokens.

    Args:
        weight: of shape (outputs, inputs).
        moment: the mean of `x xᵀ` over the tokens, or its diagonal alone. A mean in place of a sum scales all scores
            alike.
    """
    squares = moment if moment.dim() == 1 else moment.diagonal()
    return weight.abs() * squares.sqrt()


@dataclass(frozen=True)
class Wanda:
    """Keep the weights with the highest products of absolute weight and norm of their input.

    The weights of one output compete with each other alone, and every output keeps as many (Sun et al., section 3).
    """

    calibrated: ClassVar[bool] = True

    def prune(self, weight: Tensor, moment: Tensor, n: int, pattern) -> Tensor:
        """Returns the pruned weight, a copy.

        Args:
            weight: of shape (outputs, inputs).
            moment: the mean of `x xᵀ` over the calibration tokens, of shape (inputs, inputs).
            n: how many weights stay.
            pattern: the `granet.pattern.NM` that decides instead of `n`, or None.
        """
        found = scores(weight, moment)
        mask = best.of_rows(found, n) if pattern is None else best.of_groups(found, pattern)
        return weight.where(mask, 0)
