"""AC/DC: alternating compressed and decompressed training.

Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", NeurIPS 2021.
https://arxiv.org/abs/2106.12379
"""

from dataclasses import dataclass

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require, require_order, require_scope


@METHODS.add("ac-dc")
@dataclass(frozen=True, kw_only=True)
class ACDC(Method):
    """Alternate between phases of sparse and of dense training, after a dense warm-up; from `end` on stay sparse.

    A compressed phase keeps the largest weights and trains them with a fixed topology. In a decompressed phase all
    weights train; those that were pruned start from zero. A compressed phase begins only if a whole decompressed phase
    fits between it and `end`, so the last decompressed phase takes whatever steps are left.

    Args:
        sparsity: share of inactive weights among the sparse parameters at the end of training, in [0, 1).
        begin: length of the dense warm-up, in steps.
        interval: length of a compressed phase, in steps.
        end: step of the last compression.
        dense_interval: length of a decompressed phase, in steps; 0 makes it as long as a compressed one.
        scope: where weights compete: "global" (the whole network) or "layerwise".
    """

    sparsity: float
    begin: Steps  # length of the dense warm-up
    interval: Steps  # length of a compressed phase
    end: Steps  # the last compression
    dense_interval: Steps = 0  # length of a decompressed phase; 0: that of a compressed one
    scope: str = "global"

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("begin", "interval", "end"))
        require_order(self, "begin", "end")
        require_scope(self)
        if self.dense_interval:
            require(self, steps=("dense_interval",))
        if self.begin + self._cycle > self.end:
            raise ValueError(
                f"ACDC: begin={self.begin}, interval={self.interval} and dense_interval={self.dense_interval} leave no "
                f"room for a compressed and a decompressed phase before end={self.end}"
            )

    @property
    def _cycle(self) -> int:
        """The length of a compressed and a decompressed phase together."""
        return self.interval + (self.dense_interval or self.interval)

    def compressed(self, step: int) -> bool:
        """Whether the network is sparse in the steps after `step`."""
        if step < self.begin or step >= self.end:
            return step >= self.end
        since = (step - self.begin) % self._cycle
        return since < self.interval and step - since <= self.end - self._cycle

    def final_counts(self, shapes):
        everything = distribution.uniform(shapes, 1.0)
        n = distribution.budget(sum(everything.values()), 1 - self.sparsity)
        return n if self.scope == "global" else distribution.scale(everything, n)

    def is_update(self, step):
        return step > 0 and self.compressed(step) != self.compressed(step - 1)

    def update(self, step, layers, masks, rng):
        every = {name: mask | True for name, mask in masks.items()}
        if not self.compressed(step):
            return every
        n = self.final_counts(topology.shapes_of(layers))
        if self.scope == "global":
            return topology.prune_to(every, n, layers, criterion.magnitude)
        return topology.prune_each(every, n, layers, criterion.magnitude)

    def sparsity_at(self, step):
        return self.sparsity if self.compressed(step) else 0.0
