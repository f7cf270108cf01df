"""GMP: gradual magnitude pruning.

Zhu & Gupta, "To prune, or not to prune", 2017 (https://arxiv.org/abs/1710.01878); `scope="global"` with pruned weights
set to zero is the GMP that GraNet (NeurIPS 2021) compares with. What becomes of the first and the last layer: Gale et
al., "The State of Sparsity in Deep Neural Networks", 2019 (https://arxiv.org/abs/1902.09574).
"""

from dataclasses import dataclass
from math import prod

from granet import criterion, distribution, schedule, topology
from granet.methods.base import METHODS, Method, Steps, require, require_order, require_scope
from granet.schedule import Every


@METHODS.add("gmp")
@dataclass(frozen=True, kw_only=True)
class GMP(Method):
    """Start dense and prune the smallest weights every `interval` steps, until `sparsity` is reached at `end`.

    Args:
        sparsity: share of inactive weights among the sparse parameters at the end of training, in [0, 1).
        begin: step of the first pruning (t_0).
        end: step at which the final sparsity is reached (t_f).
        interval: steps between two prunings (Delta-t).
        scope: "global" ranks the weights of the whole network together; "layerwise" prunes all layers to one
            sparsity.
        schedule: how the sparsity rises: "cubic", "linear", "cosine" or "sigmoid".
        dense_first: leave the first layer dense (only with scope="layerwise"); the other layers are pruned more.
        last_sparsity: highest sparsity of the last layer (only with scope="layerwise"); 0.8 in Gale et al. (2019).
    """

    sparsity: float
    begin: Steps = 0  # t_0
    end: Steps  # t_f
    interval: Steps = 1_000  # Delta-t
    scope: str = "global"
    schedule: str = "cubic"
    dense_first: bool = False
    last_sparsity: float | None = None

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("interval", "end"))
        require_order(self, "begin", "end")
        require_scope(self)
        schedule.ramp(self.schedule)
        if self.last_sparsity is not None:
            require(self, sparsity=("last_sparsity",))
        if self.scope == "global" and (self.dense_first or self.last_sparsity is not None):
            raise ValueError('GMP: dense_first and last_sparsity belong to scope="layerwise": global pruning ranks all')

    def final_counts(self, shapes):
        n = distribution.budget(sum(map(prod, shapes.values())), 1 - self.sparsity)
        return n if self.scope == "global" else self._counts(shapes, n)

    def is_update(self, step):
        return Every(self.interval, self.begin, self.end, land=True)(step)

    def update(self, step, layers, masks, rng):
        n = distribution.budget(topology.total_of(layers), 1 - self.sparsity_at(step))
        if self.scope == "global":
            return topology.prune_to(masks, n, layers, criterion.magnitude)
        return topology.prune_each(masks, self._counts(topology.shapes_of(layers), n), layers, criterion.magnitude)

    def _counts(self, shapes, n):
        """`n` active weights over the layers: all alike, but for the first and the last."""
        sizes = {name: prod(shape) for name, shape in shapes.items()}
        first, last = next(iter(sizes)), list(sizes)[-1]
        kept = {} if self.last_sparsity is None else {last: distribution.budget(sizes[last], 1 - self.last_sparsity)}
        if self.dense_first:
            kept[first] = sizes[first]
        return distribution.alike(n, shapes, sizes, kept)

    def sparsity_at(self, step):
        return schedule.ramp(self.schedule)(0.0, self.sparsity, self.begin, self.end)(step)
