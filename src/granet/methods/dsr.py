"""DSR, dynamic sparse reparameterization: one adaptive threshold drops, and survivors decide where weights come back.

Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
Reparameterization", ICML 2019. https://arxiv.org/abs/1902.05967
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require, require_at_least
from granet.schedule import Every


@METHODS.add("dsr")
@dataclass(frozen=True, kw_only=True)
class DSR(Method):
    """Every `interval` steps, remove weights below a threshold and regrow as many, most in layers that kept most.

    The threshold doubles if fewer than `drop_fraction` of the active weights were removed and halves if more were,
    within a tolerance.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        total: length of training, in steps.
        interval: steps between two updates of the topology (N).
        drop_fraction: share of the active weights that should be removed at an update (N_p).
        threshold: magnitude below which weights are removed at the first update (H).
        tolerance: relative deviation from `drop_fraction` that leaves the threshold as it is (delta).
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    total: Steps
    interval: Steps = 1_000  # N
    drop_fraction: float = 0.1  # N_p, as a share of the active weights
    threshold: float = 1e-3  # H, at first
    tolerance: float = 0.1  # delta
    distribution: str = "uniform"

    remembers: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction", "tolerance"), steps=("total", "interval"))
        require_at_least(self, 1e-30, "threshold")
        distribution.named(self.distribution)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def final_counts(self, shapes):
        return sum(self.initial_counts(shapes).values())

    def is_update(self, step):
        return Every(self.interval, end=self.total - 1)(step)

    def update(self, step, layers, masks, rng, memory):
        import torch

        h = float(memory["threshold"]) if "threshold" in memory else self.threshold
        kept = {}
        for name, layer in layers.items():
            size = criterion.magnitude(layer)
            n = topology.count(masks[name] & (size < h))
            kept[name] = topology.drop(masks[name], size, min(n, topology.count(masks[name]) - 1))
        survivors = {name: topology.count(mask) for name, mask in kept.items()}
        active = sum(topology.count(mask) for mask in masks.values())
        k = active - sum(survivors.values())

        wanted = self.drop_fraction * active
        factor = 2.0 if k < (1 - self.tolerance) * wanted else 0.5 if k > (1 + self.tolerance) * wanted else 1.0
        memory["threshold"] = torch.tensor(h * factor, dtype=torch.float64, device="cpu")

        grown = distribution.share(k, survivors, topology.room_in(kept, layers))
        return {name: topology.grow_random(mask, grown[name], rng) for name, mask in kept.items()}

    def sparsity_at(self, step):
        return self.sparsity
