"""SNFS, sparse networks from scratch: sparse momentum says where weights are missing, between layers and within.

Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing Performance", 2019.
https://arxiv.org/abs/1907.04840
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from granet import criterion, distribution, shards, topology
from granet.methods.base import METHODS, MOMENTUM, Method, Steps, require
from granet.schedule import Cosine, Every


@METHODS.add("snfs")
@dataclass(frozen=True, kw_only=True)
class SNFS(Method):
    """Every `interval` steps (in the paper: every epoch), replace small weights by those where the momentum is large.

    Layers with more momentum get more of the new weights. The momentum is an exponential mean of dense gradients,
    gathered at every step, which costs a dense gradient each time.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        total: length of training, in steps.
        interval: steps between two updates of the topology.
        drop_fraction: share of a layer's active weights that are dropped at the first update (p).
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    total: Steps
    interval: Steps = 1_000
    drop_fraction: float = 0.5  # p, at first
    distribution: str = "uniform"

    needs_dense_grad: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction",), steps=("total", "interval"))
        distribution.named(self.distribution)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def final_counts(self, shapes):
        return sum(self.initial_counts(shapes).values())

    @property
    def averages_gradients(self):
        return True

    def gradient_mix(self, step):
        return MOMENTUM if step <= Every(self.interval, end=self.total - 1).last else None

    def is_update(self, step):
        return Every(self.interval, end=self.total - 1)(step)

    def update(self, step, layers, masks, rng):
        p = self.regeneration_at(step)
        kept, momentum, removed = {}, {}, 0
        known = criterion.with_gradient(layers)  # the others stay as they are
        for name, layer in known.items():
            active = topology.count(masks[name])
            m = criterion.gradient(layer)  # |M|
            momentum[name] = shards.total(m.where(masks[name], 0)) / active
            if not isfinite(momentum[name]):
                raise criterion.NonFiniteScores(f"the momentum of {name!r} is not finite")
            n = min(topology.part(p, active), active - 1)
            kept[name] = topology.drop(masks[name], criterion.magnitude(layer), n)
            removed += n

        # all that was removed is shared out in proportion to the mean momentum of what was active
        grown = distribution.share(removed, momentum, topology.room_in(kept, known))
        return masks | {
            name: topology.grow(kept[name], criterion.gradient(layer), grown[name]) for name, layer in known.items()
        }

    def sparsity_at(self, step):
        return self.sparsity

    def regeneration_at(self, step):
        return Cosine(self.drop_fraction, self.total)(step)
