"""RigL: drop by magnitude, grow by gradient, at a constant number of weights.

Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020. https://arxiv.org/abs/1911.11134
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import distribution
from granet.methods.base import Grows, Method, Steps, require, require_growth
from granet.schedule import Cosine, Every


@dataclass(frozen=True, kw_only=True)
class RigL(Grows, Method):
    """Every `interval` steps until `end`, each layer trades its smallest weights for its steepest gradients.

    The paper stops at 75 % of training. Where the topology is updated the optimizer does not step (the paper's
    Algorithm 1).
    """

    sparsity: float
    end: Steps  # T_end
    interval: Steps = 100  # Delta-T
    drop_fraction: float = 0.3  # alpha
    distribution: str = "erk"
    growth: str = "gradient"
    accumulate: Steps = 1

    replaces_step: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction",), steps=("end", "interval"))
        distribution.named(self.distribution)
        require_growth(self)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def is_update(self, step):
        return Every(self.interval, end=self.end - 1)(step)

    @property
    def last_growth(self):
        return Every(self.interval, end=self.end - 1).last

    def update(self, step, layers, masks, rng):
        alpha = self.regeneration_at(step)
        return self.exchanged(masks, layers, alpha, rng)

    def sparsity_at(self, step):
        return self.sparsity

    def regeneration_at(self, step):
        return Cosine(self.drop_fraction, self.end)(step)
