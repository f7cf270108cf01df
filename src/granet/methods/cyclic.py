"""Cyclic sparsity, from EAST: the density rises and falls a few times before it settles.

Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", 2024.
https://arxiv.org/abs/2411.13545
"""

from dataclasses import dataclass

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Grows, Method, Steps, require, require_at_least, require_order
from granet.schedule import Cosine, Every, Waves


@METHODS.add("cyclic")
@dataclass(frozen=True, kw_only=True)
class Cyclic(Grows, Method):
    """Until `end`, grow each layer by gradient and prune it by magnitude in cycles; then exchange weights as RigL does.

    Every cycle begins and ends at the final density and is `peak` times as dense in its middle. Layers follow the
    distribution at every density.

    Args:
        sparsity: share of inactive weights among the sparse parameters at the start and at the end, in [0, 1).
        end: step at which the last cycle ends; from then on the number of weights is constant.
        total: length of training, in steps; the share of weights that is exchanged falls towards it.
        interval: steps between two updates of the topology.
        cycles: number of cycles.
        peak: density in the middle of a cycle, as a multiple of that at the end.
        wave: how the density rises and falls in a cycle: "cosine" or "triangular".
        drop_fraction: share of a layer's active weights that are exchanged at an update after the cycles; falls along a
            cosine that begins with the training.
        distribution: how the active weights are shared among layers: "erk", "er", "uniform", or densities by layer,
            such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    end: Steps
    total: Steps
    interval: Steps = 100
    cycles: int = 2
    peak: float = 3.0
    wave: str = "cosine"
    drop_fraction: float = 0.5
    distribution: str = "erk"

    growth, accumulate = "gradient", 1  # the only growth; no fields

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction",), steps=("end", "total", "interval"))
        require_order(self, "end", "total")
        require_at_least(self, 1, "peak")
        distribution.named(self.distribution)
        Waves(0.0, 1.0, self.end, self.cycles, self.wave)
        if self.peak * (1 - self.sparsity) > 1:
            raise ValueError(
                f"Cyclic: peak={self.peak} times the density {1 - self.sparsity:.4g} of sparsity={self.sparsity} is "
                f"more than all weights: choose a peak of at most {1 / (1 - self.sparsity):.4g}"
            )

    def initial_counts(self, shapes):
        return self._counts(shapes, 0)

    def _counts(self, shapes, step):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity_at(step))

    def is_update(self, step):
        return Every(self.interval, end=self.total - 1)(step) or step == self.end

    @property
    def last_growth(self):
        return max(Every(self.interval, end=self.total - 1).last, self.end)

    def update(self, step, layers, masks, rng):
        if step > self.end:
            return self.exchanged(masks, layers, self.regeneration_at(step), rng)
        criterion.with_gradient(layers)  # one at least
        counts = self._counts(topology.shapes_of(layers), step)
        return {name: self._resized(masks[name], layer, counts[name]) for name, layer in layers.items()}

    def _resized(self, mask, layer, n):
        """The mask with `n` active weights: the largest, or all and those of the largest gradients beside them."""
        active = topology.count(mask)
        if n <= active:
            return topology.top([layer], criterion.magnitude, n, [mask], candidates=active)[0]
        if not layer.has_grad:  # frozen, or not used by the loss: nothing says where it should grow
            return mask
        return mask | topology.top([layer], criterion.gradient, n - active, [~mask], beside=[(mask, mask)])[0]

    def candidates(self, step, active):
        return super().candidates(step, active) if step > self.end else None

    def sparsity_at(self, step):
        return Waves(self.sparsity, 1 - self.peak * (1 - self.sparsity), self.end, self.cycles, self.wave)(step)

    def regeneration_at(self, step):
        if step <= self.end or step >= self.total:  # what the last step grew would stay zero
            return 0.0
        return Cosine(self.drop_fraction, self.total, final=min(0.005, self.drop_fraction))(step)
