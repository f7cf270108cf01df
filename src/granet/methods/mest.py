"""MEST: sparse training within a memory bound, by a mutation that falls.

Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", NeurIPS 2021.
https://arxiv.org/abs/2110.14032
"""

from dataclasses import dataclass

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require, require_at_least, require_order
from granet.schedule import Every


@METHODS.add("mest")
@dataclass(frozen=True, kw_only=True)
class MEST(Method):
    """Every `interval` steps, each layer replaces its weights of least `|w| + lambda * |g|` by random ones.

    The share that is replaced is `drop_fraction`, half of it from `halve` on, and nothing from `end` on (elastic
    mutation, EM).

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        halve: step from which half as many weights are replaced.
        end: step from which the topology is fixed.
        interval: steps between two updates of the topology (Delta-T).
        drop_fraction: share of a layer's active weights that are replaced at an update.
        gradient_weight: weight of |gradient| beside |weight| in the importance (lambda).
        soft_bound: EM&S: new weights are added first and train beside the others; the least important of all are
            removed at the next update.
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    halve: Steps
    end: Steps
    interval: Steps = 1_000
    drop_fraction: float = 0.2
    gradient_weight: float = 0.01  # lambda
    soft_bound: bool = False
    distribution: str = "uniform"

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction",), steps=("halve", "end", "interval"))
        require_order(self, "halve", "end")
        require_at_least(self, 0, "gradient_weight")
        distribution.named(self.distribution)
        if self.soft_bound and (1 - self.sparsity) * (1 + self.drop_fraction) > 1:
            raise ValueError(
                f"MEST: with soft_bound, drop_fraction={self.drop_fraction} on top of sparsity={self.sparsity} is more "
                "than all weights"
            )

    @property
    def needs_grad(self):
        return self.gradient_weight > 0

    def initial_counts(self, shapes):
        return self._counts(shapes, 0)

    def final_counts(self, shapes):
        return self._counts(shapes, self.end)

    def _counts(self, shapes, step):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity_at(step))

    def is_update(self, step):
        return Every(self.interval, end=self.end, land=self.soft_bound)(step) and (step < self.end or self.soft_bound)

    def update(self, step, layers, masks, rng):
        if self.needs_grad:
            criterion.with_gradient(layers)  # one at least
        known = {name: self._known(layer, masks[name]) for name, layer in layers.items()}
        if not self.soft_bound:
            p = self.regeneration_at(step)
            return {
                name: topology.rewire(masks[name], layer, p, rng, lose=self._importance)
                for name, layer in known.items()
            }
        shapes = topology.shapes_of(layers)
        final, more = self.final_counts(shapes), self._counts(shapes, step)
        target = {name: min(final[name], more[name]) for name in shapes}
        kept = topology.prune_each(masks, target, known, self._importance)
        # masks from elsewhere may have more in a layer than its budget: the others get so many fewer
        active = {name: topology.count(mask) for name, mask in kept.items()}
        wanted = {name: max(0, more[name] - active[name]) for name in kept}
        grown = distribution.share(sum(more.values()) - sum(active.values()), wanted, wanted)
        return {name: topology.grow_random(mask, grown[name], rng) for name, mask in kept.items()}

    def _known(self, layer, mask):
        """The layer with the gradient of its active weights alone: no other is looked at."""
        if not self.needs_grad or layer.grad is None:
            return layer
        return criterion.Layer(layer.weight, criterion.gradient(layer).where(mask, 0))

    def _importance(self, layer):
        size = criterion.magnitude(layer)
        if not self.needs_grad or layer.grad is None:
            return size
        return size + self.gradient_weight * criterion.gradient(layer)

    def sparsity_at(self, step):
        return (
            1 - min(1.0, (1 - self.sparsity) * (1 + self.regeneration_at(step))) if self.soft_bound else self.sparsity
        )

    def regeneration_at(self, step):
        if step >= self.end:
            return 0.0
        return self.drop_fraction / (2 if step >= self.halve else 1)
