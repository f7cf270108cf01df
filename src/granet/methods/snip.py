"""SNIP: keep the connections that the loss is most sensitive to, found before training.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019
(https://arxiv.org/abs/1810.02340); in several rounds, iterative SNIP: de Jorge et al., "Progressive Skeletonization:
Trimming more fat from a network at initialization", ICLR 2021 (https://arxiv.org/abs/2006.09081).
"""

from dataclasses import dataclass

from granet.methods.base import METHODS, AtInitialization, require


@METHODS.add("snip")
@dataclass(frozen=True, kw_only=True)
class SNIP(AtInitialization):
    """Before training, keep the weights of the network with the largest `|g * w|`; the topology then stays as it is.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        rounds: number of rounds of scoring and pruning (T); 1 is the paper's single shot, more follow an
            exponential schedule.
        batch_statistics: score with batch norm on the statistics of the batch; False scores in evaluation mode,
            where the batch norms of a new network are the identity, as the authors' code does.
    """

    rounds: int = 1  # T
    batch_statistics: bool = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("rounds",))

    def init(self, layers, rng, probe):
        def sensitivity(masks):
            g = probe.gradients(masks, training=self.batch_statistics)
            # without its normalisation: only the order counts
            return {name: (g[name] * layer.weight).abs() for name, layer in layers.items()}

        return self.pruned(layers, sensitivity, self.rounds)
