"""SNIP: keep the connections that the loss is most sensitive to, found before training.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019
(https://arxiv.org/abs/1810.02340); in several rounds, iterative SNIP: de Jorge et al., "Progressive Skeletonization:
Trimming more fat from a network at initialization", ICLR 2021 (https://arxiv.org/abs/2006.09081).
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import Method, require


@dataclass(frozen=True, kw_only=True)
class SNIP(Method):
    """Before training, keep the weights of the largest `|g * w|` of the whole network; the topology then stays.

    `rounds=1` is the paper's single shot; more rounds score anew what is left, along an exponential schedule.
    """

    sparsity: float
    rounds: int = 1  # T

    needs_probe: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("rounds",))

    def final_counts(self, shapes):
        return distribution.budget(sum(distribution.uniform(shapes, 1.0).values()), 1 - self.sparsity)

    def init(self, layers, rng, probe):
        import torch

        masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
        for t in range(1, self.rounds + 1):
            g = probe.gradients(masks)
            # connection sensitivity, without its normalisation: only the order counts
            s = {name: criterion.Layer((g[name] * layer.weight).abs()) for name, layer in layers.items()}
            n = distribution.budget(topology.total_of(layers), (1 - self.sparsity) ** (t / self.rounds))
            masks = topology.prune_to(masks, n, s, criterion.given)
        return masks

    def sparsity_at(self, step):
        return self.sparsity
