"""RigL: drop by magnitude, grow by gradient, at a constant number of weights.

Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020. https://arxiv.org/abs/1911.11134
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import distribution
from granet.methods.base import METHODS, Grows, Method, Steps, require, require_growth
from granet.schedule import Cosine, Every


@METHODS.add("rigl")
@dataclass(frozen=True, kw_only=True)
class RigL(Grows, Method):
    """Every `interval` steps until `end`, each layer replaces its smallest weights by those of largest gradient.

    The paper stops at 75 % of training. Where the topology is updated, the optimizer does not step (Algorithm 1).

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        end: step from which the topology is fixed (T_end).
        interval: steps between two updates of the topology (Delta-T).
        drop_fraction: share of a layer's active weights that are replaced at the first update (alpha); falls to 0
            along a cosine.
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
        growth: what new weights are chosen by: "gradient", "momentum" (a mean over steps), "explore" (the largest
            gradients of a few random ones) or "random".
        explored: how many random inactive weights `growth="explore"` looks at for each active one (gamma).
        accumulate: number of steps whose gradients are averaged for growth; 1 takes the gradient of the update's
            step.
    """

    sparsity: float
    end: Steps  # T_end
    interval: Steps = 100  # Delta-T
    drop_fraction: float = 0.3  # alpha
    distribution: str = "erk"
    growth: str = "gradient"
    explored: float = 1.0
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
        return Every(self.interval, end=self.end - 1).last if self.drop_fraction else 0

    def update(self, step, layers, masks, rng):
        alpha = self.regeneration_at(step)
        return self.exchanged(masks, layers, alpha, rng)

    def sparsity_at(self, step):
        return self.sparsity

    def regeneration_at(self, step):
        return Cosine(self.drop_fraction, self.end)(step)
