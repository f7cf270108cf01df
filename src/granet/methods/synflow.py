"""SynFlow: prune before training and without data, so that no layer collapses.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
https://arxiv.org/abs/2006.05467
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import Method, require


@dataclass(frozen=True, kw_only=True)
class SynFlow(Method):
    """Before training, in many rounds, keep the weights that the most synaptic flow passes through.

    All layers have the same flow in total, so a small one has much flow a weight; scoring anew in every round of an
    exponential schedule keeps it from being cut off.
    """

    sparsity: float
    rounds: int = 100  # n

    needs_probe: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("rounds",))

    def final_counts(self, shapes):
        return distribution.budget(sum(distribution.uniform(shapes, 1.0).values()), 1 - self.sparsity)

    def init(self, layers, rng, probe):
        import torch

        masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
        for k in range(1, self.rounds + 1):  # Algorithm 1
            s = {name: criterion.Layer(flow) for name, flow in probe.synaptic_flow(masks).items()}
            n = distribution.budget(topology.total_of(layers), (1 - self.sparsity) ** (k / self.rounds))
            masks = topology.prune_to(masks, n, s, criterion.given)
        return masks

    def sparsity_at(self, step):
        return self.sparsity
