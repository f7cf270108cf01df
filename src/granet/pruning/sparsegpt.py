"""SparseGPT: pruning with reconstruction, column by column (Frantar & Alistarh, ICML 2023).

https://arxiv.org/abs/2301.00774, Algorithm 1. In the comments: H is the Hessian of a layer's squared error, the second
moment of its inputs; U is the upper Cholesky factor of its inverse, whose row j holds what Gaussian elimination leaves
of the inverse when columns 0 to j - 1 are settled.
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from granet.pruning import best


@dataclass(frozen=True)
class SparseGPT:
    """Prune the columns from left to right, and let the weights to the right make up for the error of each.

    Args:
        dampening: the share of the mean of H's diagonal that is added to the diagonal. It makes H invertible where
            there are fewer tokens than inputs.
        columns: how many columns choose their mask together (the paper's B_s); under N:M, the columns of each group
            choose it together.
    """

    dampening: float = 0.01
    columns: int = 128

    calibrated: ClassVar[bool] = True

    def __post_init__(self):
        if not (isfinite(self.dampening) and self.dampening >= 0):
            raise ValueError(f"dampening={self.dampening}: give a number from 0; the default is 0.01")
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:
            raise ValueError(f"columns={self.columns!r}: give a whole number from 1; the paper has 128")

    def prune(self, weight: Tensor, moment: Tensor, n: int, pattern) -> Tensor:
        """Returns the pruned weight, a copy in which the weights that stay have changed.

        Args:
            weight: of shape (outputs, inputs).
            moment: the mean of `x xᵀ` over the calibration tokens, of shape (inputs, inputs).
            n: how many weights stay.
            pattern: the `granet.pattern.NM` that decides instead of `n`, or None.

        Raises:
            ValueError: H plus the dampening cannot be inverted.
        """
        weight, size = weight.clone(), weight.shape[1]
        group = 1 if pattern is None else pattern.m
        width = max(group, self.columns - self.columns % group)
        inverse = _factor(moment, self.dampening)
        dead = moment.diagonal() == 0
        for start in range(0, size, width):
            stop = min(start + width, size)
            part, local = weight[:, start:stop], inverse[start:stop, start:stop]
            if pattern is None:  # whole numbers that add up to n
                count = n * stop // size - n * start // size
                mask = best.of_matrix(_scores(part, local, dead[start:stop]), count)
            else:
                mask = torch.zeros_like(part, dtype=torch.bool)
            errors = torch.zeros_like(part)
            for j in range(stop - start):
                if pattern is not None and j % group == 0:
                    at = slice(j, j + group)
                    found = _scores(part[:, at], local[at, at], dead[start:stop][at])
                    mask[:, at] = best.of_groups(found, pattern)
                error = part[:, j].masked_fill(mask[:, j], 0) / local[j, j]
                part[:, j:] -= torch.outer(error, local[j, j:])
                part[:, j].masked_fill_(~mask[:, j], 0)  # zero already, but for rounding
                errors[:, j] = error
            weight[:, stop:] -= errors @ inverse[start:stop, stop:]
        return weight


def _scores(weight: Tensor, inverse: Tensor, dead: Tensor) -> Tensor:
    """The error that pruning each weight would leave, w² / [H⁻¹]_jj; none at inputs that are always zero."""
    return (weight / inverse.diagonal()).square().masked_fill(dead, 0)


def _factor(moment: Tensor, dampening: float) -> Tensor:
    """The upper Cholesky factor U of the inverse of the dampened Hessian: H⁻¹ = Uᵀ U."""
    hessian, diagonal = moment.clone(), moment.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    # an input that is always zero has no curvature; any positive number will do, as its row of H is zero
    hessian.diagonal().copy_(diagonal.where(live, mean) + dampening * mean)
    try:
        lower = torch.linalg.cholesky(hessian)
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    except torch.linalg.LinAlgError:
        raise ValueError(
            f"the second moment of its {len(moment)} inputs, with dampening={dampening}, cannot be inverted: calibrate "
            "on more tokens than it has inputs, or use SparseGPT(dampening=...) with a larger number"
        ) from None
