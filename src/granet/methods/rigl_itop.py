"""RigL-ITOP: RigL that explores more, with rare large updates to the end of training.

Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training", ICML
2021. https://arxiv.org/abs/2102.02887
"""

from dataclasses import dataclass

from granet import distribution
from granet.methods.base import METHODS, Grows, Method, Steps, require, require_growth
from granet.schedule import Cosine, Every


@METHODS.add("rigl-itop")
@dataclass(frozen=True, kw_only=True)
class RigLITOP(Grows, Method):
    """Every `interval` steps to the end, each layer replaces its smallest weights by those of largest gradient.

    Long intervals give new weights time to grow before they are judged, and over the whole training many weights have
    been active: `Sparsifier.exploration` is the paper's R_s. No optimizer step is left out. `growth="random"` is
    SET-ITOP.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        total: length of training, in steps.
        interval: steps between two updates of the topology (Delta-T).
        drop_fraction: share of a layer's active weights that are replaced at the first update.
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
        growth: what new weights are chosen by: "gradient", "momentum" (a mean over steps), "explore" (the largest
            gradients of a few random ones) or "random".
        explored: how many random inactive weights `growth="explore"` looks at for each active one (gamma).
        accumulate: number of steps whose gradients are averaged for growth; 1 takes the gradient of the update's
            step.
    """

    sparsity: float
    total: Steps
    interval: Steps = 4_000  # Delta-T
    drop_fraction: float = 0.5
    distribution: str = "erk"
    growth: str = "gradient"
    explored: float = 1.0
    accumulate: Steps = 1

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction",), steps=("total", "interval"))
        distribution.named(self.distribution)
        require_growth(self)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def is_update(self, step):
        return Every(self.interval, end=self.total - 1)(step)

    @property
    def last_growth(self):
        return Every(self.interval, end=self.total - 1).last if self.drop_fraction else 0

    def update(self, step, layers, masks, rng):
        p = self.regeneration_at(step)
        return self.exchanged(masks, layers, p, rng)

    def sparsity_at(self, step):
        return self.sparsity

    def regeneration_at(self, step):
        return Cosine(self.drop_fraction, self.total, final=min(0.005, self.drop_fraction))(step)
