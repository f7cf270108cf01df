"""GraSP: prune before training so that the gradient keeps flowing.

Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020.
https://arxiv.org/abs/2002.07376
"""

from dataclasses import dataclass

from granet.methods.base import METHODS, AtInitialization, require


@METHODS.add("grasp")
@dataclass(frozen=True, kw_only=True)
class GraSP(AtInitialization):
    """Before training, remove the weights with the largest `-w * (H g)`; the topology then stays as it is.

    To first order this score is the change of the gradient flow `g . g` when the weight is removed. The paper gives the
    probe ten examples of each class.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        temperature: what the network's output is divided by (T), so that the loss is far from saturated.
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
