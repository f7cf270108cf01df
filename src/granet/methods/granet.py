"""GraNet: gradual pruning with zero-cost neuroregeneration.

Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021.
https://arxiv.org/abs/2106.10404
"""

from dataclasses import dataclass
from math import prod

from granet import criterion, distribution, schedule, topology
from granet.methods.base import METHODS, Grows, Method, Steps, require, require_growth, require_order, require_scope
from granet.schedule import Cosine, Every


@METHODS.add("granet")
@dataclass(frozen=True, kw_only=True)
class GraNet(Grows, Method):
    """Every `interval` steps, prune a little, then let each layer regrow the weights with the largest gradients.

    Regrowth costs nothing: each layer drops as many of its smallest weights as it regrows. `initial_sparsity=0.5`
    trains sparse-to-sparse, `0.0` dense-to-sparse. `scope="layerwise"` is GraNet-uniform: pruning brings all layers to
    one density instead of removing the smallest weights of the whole network. A layer that starts sparser than that
    keeps what it has, and the other layers make up for it, so that the whole network reaches `sparsity`.

    Args:
        sparsity: share of inactive weights among the sparse parameters at the end of training, in [0, 1).
        initial_sparsity: share of inactive weights at the start (s_i); 0 starts dense.
        begin: step from which the network is pruned (t_0).
        end: last step of gradual pruning (t_f).
        total: length of training, in steps (T); the regeneration ratio falls to zero towards it.
        interval: steps between two updates of the topology (Delta-T).
        regeneration: share of a layer's active weights that are dropped and regrown at the first update (r).
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
        scope: where weights compete in pruning: "global" or "layerwise".
        last_sparsity: highest sparsity of the last layer (only with scope="layerwise"); 0.8 in the paper's code.
        schedule: how the sparsity rises: "cubic", "linear", "cosine" or "sigmoid".
        growth: what new weights are chosen by: "gradient", "momentum" (a mean over steps), "explore" (the largest
            gradients of a few random ones) or "random".
        explored: how many random inactive weights `growth="explore"` looks at for each active one (gamma).
        accumulate: number of steps whose gradients are averaged for growth; 1 takes the gradient of the update's
            step.
    """

    sparsity: float
    initial_sparsity: float = 0.5
    begin: Steps = 0  # t_0
    end: Steps  # t_f: the last step of gradual pruning
    total: Steps  # T: the length of training; regeneration fades out towards it
    interval: Steps = 1_000  # Delta-T
    regeneration: float = 0.5  # r: the share of a layer's active weights exchanged at an update, at first
    distribution: str = "erk"
    scope: str = "global"
    last_sparsity: float | None = None
    schedule: str = "cubic"
    growth: str = "gradient"
    explored: float = 1.0
    accumulate: Steps = 1

    def __post_init__(self):
        require(
            self, sparsity=("sparsity", "initial_sparsity"), share=("regeneration",), steps=("interval", "end", "total")
        )
        require_order(self, "begin", "end", "total")
        require_scope(self)
        distribution.named(self.distribution)
        schedule.ramp(self.schedule)
        require_growth(self)
        if self.last_sparsity is not None:
            require(self, sparsity=("last_sparsity",))
            if self.scope == "global":
                raise ValueError('GraNet: last_sparsity belongs to scope="layerwise": global pruning ranks all')
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"GraNet: initial_sparsity={self.initial_sparsity} must not exceed sparsity={self.sparsity}"
            )

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.initial_sparsity)

    def final_counts(self, shapes):
        n = distribution.budget(sum(map(prod, shapes.values())), 1 - self.sparsity)
        return n if self.scope == "global" else self._counts(shapes, n)

    def _counts(self, shapes, n):
        """`n` active weights over the layers: all alike, as far as they had so many at first, but for the last."""
        last, kept = list(shapes)[-1], {}
        if self.last_sparsity is not None:
            kept[last] = distribution.budget(prod(shapes[last]), 1 - self.last_sparsity)
        return distribution.alike(n, shapes, self.initial_counts(shapes), kept)

    def is_update(self, step):
        return Every(self.interval, self.begin, self.total - 1)(step) or step == self.end

    @property
    def last_growth(self):
        return max(Every(self.interval, self.begin, self.total - 1).last, self.end) if self.regeneration else 0

    def update(self, step, layers, masks, rng):
        # gradual pruning: the smallest weights go, until s_t is reached (Eq. 1)
        before, n = masks, distribution.budget(topology.total_of(layers), 1 - self.sparsity_at(step))
        if self.scope == "global":
            masks = topology.prune_to(masks, n, layers, criterion.magnitude)
        else:
            masks = topology.prune_each(masks, self._counts(topology.shapes_of(layers), n), layers, criterion.magnitude)

        # zero-cost neuroregeneration: each layer trades its smallest weights for its steepest gradients (Eq. 2, 3)
        r = self.regeneration_at(step)
        return self.exchanged(masks, layers, r, rng, before=before)

    def sparsity_at(self, step):
        return schedule.ramp(self.schedule)(self.initial_sparsity, self.sparsity, self.begin, self.end)(step)

    def regeneration_at(self, step):
        # the last step of training regenerates nothing: what it grew would stay zero
        if step >= self.total or self.regeneration == 0:
            return 0.0
        return Cosine(self.regeneration, self.total, final=min(0.005, self.regeneration))(step)
