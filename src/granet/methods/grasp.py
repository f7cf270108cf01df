"""GraSP: prune before training so that the gradient keeps flowing.

Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
https://arxiv.org/abs/2002.07376
"""

from dataclasses import dataclass

from granet.methods.base import AtInitialization, require


@dataclass(frozen=True, kw_only=True)
class GraSP(AtInitialization):
    """Before training, remove the weights of the largest `-w * (H g)`; the topology then stays.

    To first order that is the change of the gradient flow `g . g` when the weight goes. Give the probe ten examples of
    each class, as the paper does.
    """

    temperature: float = 200.0  # T: what the output is divided by, so that the loss is far from saturated

    def __post_init__(self):
        require(self, sparsity=("sparsity",))
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"GraSP: temperature={self.temperature} is no positive number")

    def init(self, layers, rng, probe):
        def kept(masks):
            hg = probe.hessian_gradient(masks, self.temperature)
            # S(-w) = -w * Hg: the largest go, so the largest of w * Hg stay
            return {name: layer.weight * hg[name] for name, layer in layers.items()}

        return self.pruned(layers, kept)
