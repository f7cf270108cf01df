"""SET: sparse evolutionary training, which drops by magnitude and grows at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", Nature Communications 2018. https://arxiv.org/abs/1707.04780
"""

from dataclasses import dataclass

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require
from granet.schedule import Every


@METHODS.add("set")
@dataclass(frozen=True, kw_only=True)
class SET(Method):
    """Every `interval` steps (in the paper: every epoch), each layer replaces its smallest weights by random ones.

    The last update comes before `total`, so that the weights it grows are trained.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        total: length of training, in steps.
        interval: steps between two updates of the topology.
        drop_fraction: share of a layer's active weights that are replaced at an update (zeta).
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
        by_sign: drop the same share of the positive and of the negative weights, as the paper does.
    """

    sparsity: float
    total: Steps
    interval: Steps = 1_000
    drop_fraction: float = 0.3  # zeta
    distribution: str = "er"
    by_sign: bool = False

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction",), steps=("total", "interval"))
        distribution.named(self.distribution)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def is_update(self, step):
        return step < self.total and Every(self.interval)(step)

    def update(self, step, layers, masks, rng):
        rewire = self._rewire_by_sign if self.by_sign else self._rewire
        return {name: rewire(masks[name], layer, rng) for name, layer in layers.items()}

    def _rewire(self, mask, layer, rng):
        return topology.rewire(mask, layer, self.drop_fraction, rng, lose=criterion.magnitude)

    def _rewire_by_sign(self, mask, layer, rng):
        active = topology.count(mask)
        n = topology.part(self.drop_fraction, active)
        negative = mask & (layer.weight < 0)
        fewer = n * topology.count(negative) // active
        size = criterion.magnitude(layer)
        kept = topology.drop(negative, size, fewer) | topology.drop(mask & ~negative, size, n - fewer)
        return topology.grow_random(kept, n, rng)

    def sparsity_at(self, step):
        return self.sparsity

    def regeneration_at(self, step):
        return self.drop_fraction
