"""GMP: gradual magnitude pruning.

Zhu & Gupta, "To prune, or not to prune", 2017 (https://arxiv.org/abs/1710.01878); `scope="global"` with pruned weights
set to zero is the GMP that GraNet (NeurIPS 2021) compares with.
"""

from dataclasses import dataclass

from granet import criterion, distribution, topology
from granet.methods.base import Method, Steps, require, require_order, require_scope
from granet.schedule import Cubic, Every


@dataclass(frozen=True, kw_only=True)
class GMP(Method):
    """Train dense, and every `interval` steps prune the smallest weights, until `sparsity` is reached at `end`.

    `scope="global"` ranks the weights of the whole network together; `"layerwise"` prunes every layer alike.
    """

    sparsity: float
    begin: Steps = 0  # t_0
    end: Steps  # t_f
    interval: Steps = 1_000  # Delta-t
    scope: str = "global"

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("interval", "end"))
        require_order(self, "begin", "end")
        require_scope(self)

    def final_counts(self, shapes):
        everything = distribution.uniform(shapes, 1.0)
        n = distribution.budget(sum(everything.values()), 1 - self.sparsity)
        return n if self.scope == "global" else distribution.scale(everything, n)

    def is_update(self, step):
        return Every(self.interval, self.begin, self.end, land=True)(step)

    def update(self, step, layers, masks, rng):
        n = distribution.budget(topology.total_of(layers), 1 - self.sparsity_at(step))
        if self.scope == "global":
            return topology.prune_to(masks, n, layers, criterion.magnitude)
        counts = distribution.scale(distribution.uniform(topology.shapes_of(layers), 1.0), n)
        return topology.prune_each(masks, counts, layers, criterion.magnitude)

    def sparsity_at(self, step):
        return Cubic(0.0, self.sparsity, self.begin, self.end)(step)
