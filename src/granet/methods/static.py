"""Static sparse training: a random topology, drawn once and kept.

The baseline of Mocanu et al. 2018 and Evci et al. 2020 ("static"); with `distribution="erk"`, "static ERK".
"""

from dataclasses import dataclass

from granet import distribution
from granet.methods.base import METHODS, Method, require


@METHODS.add("static")
@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """A random topology of the given sparsity, which training does not change.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    distribution: str = "erk"

    def __post_init__(self):
        require(self, sparsity=("sparsity",))
        distribution.named(self.distribution)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def sparsity_at(self, step):
        return self.sparsity
