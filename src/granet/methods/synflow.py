"""SynFlow: prune before training and without data, so that no layer collapses.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
https://arxiv.org/abs/2006.05467
"""

from dataclasses import dataclass

from granet.methods.base import AtInitialization, require


@dataclass(frozen=True, kw_only=True)
class SynFlow(AtInitialization):
    """Before training, in many rounds, keep the weights that the most synaptic flow passes through.

    All layers have the same flow in total, so a small one has much flow a weight; scoring anew in every round of an
    exponential schedule keeps it from being cut off.
    """

    rounds: int = 100  # n

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("rounds",))

    def init(self, layers, rng, probe):
        return self.pruned(layers, probe.synaptic_flow, self.rounds)  # Algorithm 1
