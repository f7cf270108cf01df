"""Feather: gradual pruning by a threshold, with gradients straight through it to all weights.

Glentis Georgoulakis, Retsinas, Maragos, "Feather: An Elegant Solution to Effective DNN Sparsification", BMVC 2023.
https://arxiv.org/abs/2310.02448
"""

from dataclasses import dataclass
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require, require_at_least, require_order
from granet.schedule import Cubic, Every


@METHODS.add("feather")
@dataclass(frozen=True, kw_only=True)
class Feather(Method):
    """Compute with the weights above a threshold T, as `sign(w) * (|w| ** p - T ** p) ** (1 / p)`, and train all.

    Every weight gets the gradient of its effective weight, and an inactive one `theta` times that, so that it can grow
    above the threshold again. T is one number for all layers, and is chosen anew every `interval` steps to the end.

    Args:
        sparsity: share of inactive weights among the sparse parameters at the end of training, in [0, 1).
        begin: step of the first pruning.
        end: step at which the final sparsity is reached; half of training in the paper.
        interval: steps between two choices of the threshold; 1 in the paper.
        p: shape of the thresholding operator, at least 1: 1 is soft thresholding, and the larger, the nearer it is to
            hard thresholding.
        theta: factor of the gradients of inactive weights, in [0, 1]. None makes it 1 up to a sparsity of 95 %, and 0.5
            above.
    """

    sparsity: float
    begin: Steps = 0
    end: Steps
    interval: Steps = 1
    p: float = 3.0
    theta: float | None = None

    reparameterizes: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), steps=("interval", "end"))
        require_order(self, "begin", "end")
        require_at_least(self, 1, "p")
        if self.theta is not None:
            require(self, share=("theta",))

    def final_counts(self, shapes):
        return distribution.budget(sum(super().final_counts(shapes).values()), 1 - self.sparsity)

    def is_update(self, step):
        return Every(self.interval, self.begin)(step) or step == self.end

    def update(self, step, layers, masks, rng):
        every = {name: mask | True for name, mask in masks.items()}
        n = distribution.budget(topology.total_of(layers), 1 - self.sparsity_at(step))
        return topology.prune_to(every, n, layers, criterion.magnitude)

    def companions(self, layers, masks):
        pruned = [layer.weight.abs().masked_fill(masks[name], 0) for name, layer in layers.items()]
        threshold = max(sizes.max().item() for sizes in pruned)  # T, the same in all layers
        return {
            name: {
                "active": masks[name],
                "trained": masks[name] | True,
                "threshold": layer.weight.new_tensor(threshold),
            }
            for name, layer in layers.items()
        }

    def effective(self, weight, active, trained, threshold):
        values, sizes = weight.detach(), weight.detach().abs()
        shrunk = values * (1 - (threshold / sizes) ** self.p) ** (1 / self.p)
        passed = weight if self._theta == 1 else weight.where(active, self._theta * weight)  # gradients reach all ...
        return shrunk.where(active & (sizes > threshold), 0) + (passed - passed.detach())  # ... values are thresholded

    @property
    def _theta(self) -> float:
        if self.theta is not None:
            return self.theta
        return 0.5 if self.sparsity > 0.95 else 1.0

    def sparsity_at(self, step):
        return Cubic(0.0, self.sparsity, self.begin, self.end)(step)
