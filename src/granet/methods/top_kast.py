"""Top-KAST: always sparse training, forward with the largest weights, backward with some more.

Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020. https://arxiv.org/abs/2106.03517
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require, require_scope
from granet.schedule import Every


@METHODS.add("top-kast")
@dataclass(frozen=True, kw_only=True)
class TopKAST(Method):
    """Compute with the largest weights (set A) and train a larger set B; both are chosen every `interval` steps.

    The weights of B outside of A are not computed with, but are trained by the gradients of the sparse network, so that
    they can become large enough for A. Weights outside of B keep their values.

    Args:
        sparsity: share of weights outside of A, in [0, 1); 1 - D of the paper.
        backward_sparsity: share of weights outside of B; 1 - (D + M) of the paper. None makes B twice as large as
            A.
        interval: steps between two choices of A and B.
        decay: L2 penalty of the exploration loss; takes the place of the optimizer's weight decay.
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
        scope: where weights compete: "global" or "layerwise".
    """

    sparsity: float  # 1 - D, of the forward pass
    backward_sparsity: float | None = None  # 1 - (D + M); None: M = D, twice as many weights as in the forward pass
    interval: Steps = 10
    decay: float = 1e-4  # of the exploration loss, an L2 penalty
    distribution: str = "uniform"
    scope: str = "layerwise"

    reparameterizes: ClassVar[bool] = True
    decays: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("interval",))
        require_scope(self)
        distribution.named(self.distribution)
        if self.backward_sparsity is not None and not 0 <= self.backward_sparsity <= self.sparsity:
            raise ValueError(
                f"TopKAST: backward_sparsity={self.backward_sparsity} is outside [0, sparsity={self.sparsity}]: the "
                "backward pass has all weights of the forward pass, and more"
            )
        if not (isfinite(self.decay) and self.decay >= 0):
            raise ValueError(f"TopKAST: decay={self.decay} is no number of 0 or more")

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def final_counts(self, shapes):
        counts = self.initial_counts(shapes)
        return counts if self.scope == "layerwise" else sum(counts.values())

    def init(self, layers, rng):
        return self._largest(layers, self.sparsity)

    def is_update(self, step):
        return Every(self.interval)(step)

    def update(self, step, layers, masks, rng):
        return self._largest(layers, self.sparsity)

    def companions(self, layers, masks):
        more = max(0.0, 2 * self.sparsity - 1) if self.backward_sparsity is None else self.backward_sparsity
        wider = self._largest(layers, more)
        return {name: {"active": masks[name], "trained": wider[name] | masks[name]} for name in layers}

    def effective(self, weight, active, trained):
        weight = weight.where(trained, 0)  # gradients reach B ...
        return weight - weight.where(~active, 0).detach()  # ... values come from A

    def penalty(self, weight, active, trained):
        # the gradient of the exploration loss: |w|^2 / 2 on A, that over D on B without A (section 2.3)
        return self.decay * weight.where(active, weight / (1 - self.sparsity)).where(trained, 0)

    def _largest(self, layers, sparsity):
        """The largest weights of each layer, or of all layers together."""
        shapes = topology.shapes_of(layers)
        all_of = {name: layer.weight.new_ones(layer.shape, dtype=bool) for name, layer in layers.items()}
        counts = distribution.named(self.distribution)(shapes, 1 - sparsity)
        if self.scope == "layerwise":
            return topology.prune_each(all_of, counts, layers, criterion.magnitude)
        return topology.prune_to(all_of, sum(counts.values()), layers, criterion.magnitude)

    def sparsity_at(self, step):
        return self.sparsity
