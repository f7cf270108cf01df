"""SynFlow: prune before training and without data, so that no layer collapses.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
https://arxiv.org/abs/2006.05467
"""

from dataclasses import dataclass

from granet.methods.base import METHODS, AtInitialization, require


@METHODS.add("synflow")
@dataclass(frozen=True, kw_only=True)
class SynFlow(AtInitialization):
    """Before training, in many rounds, keep the weights through which most synaptic flow passes.

    All layers have the same total flow, so the weights of a small layer have much flow each. Scoring again in every
    round of an exponential schedule keeps such a layer from being cut off.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        rounds: number of rounds of scoring and pruning (n).
    """

    rounds: int = 100  # n

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("rounds",))

    def init(self, layers, rng, probe):
        return self.pruned(layers, probe.synaptic_flow, self.rounds)  # Algorithm 1
