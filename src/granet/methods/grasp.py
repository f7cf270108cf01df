"""GraSP: prune before training so that the gradient keeps flowing.

Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
https://arxiv.org/abs/2002.07376
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import Method, require


@dataclass(frozen=True, kw_only=True)
class GraSP(Method):
    """Before training, remove the weights of the largest `-w * (H g)`; the topology then stays.

    To first order that is the change of the gradient flow `g . g` when the weight goes. Give the probe ten examples of
    each class, as the paper does.
    """

    sparsity: float
    temperature: float = 200.0  # T: what the output is divided by, so that the loss is far from saturated

    needs_probe: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",))
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"GraSP: temperature={self.temperature} is no positive number")

    def final_counts(self, shapes):
        return distribution.budget(sum(distribution.uniform(shapes, 1.0).values()), 1 - self.sparsity)

    def init(self, layers, rng, probe):
        import torch

        masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
        hg = probe.hessian_gradient(masks, self.temperature)
        # S(-w) = -w * Hg: the largest go, so the largest of w * Hg stay
        kept = {name: criterion.Layer(layer.weight * hg[name]) for name, layer in layers.items()}
        n = distribution.budget(topology.total_of(layers), 1 - self.sparsity)
        return topology.prune_to(masks, n, kept, criterion.given)

    def sparsity_at(self, step):
        return self.sparsity
