"""STR: soft threshold weight reparameterization, which learns how sparse each layer is.

Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020.
https://arxiv.org/abs/2002.03231
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from granet import criterion
from granet.methods.base import METHODS, Method, Steps, require
from granet.schedule import Every


@METHODS.add("str")
@dataclass(frozen=True, kw_only=True)
class STR(Method):
    """The network computes with `sign(w) * max(|w| - sigmoid(s), 0)`, and each layer learns its threshold `s`.

    How sparse the network gets is an outcome, above all of weight decay: it pulls `s` from `s_init` towards 0, which
    raises the threshold.

    Args:
        s_init: initial value of each layer's threshold, before the sigmoid.
        interval: steps between two readings of the masks off the weights, for records only.
    """

    s_init: float = -5.0
    interval: Steps = 100

    reparameterizes: ClassVar[bool] = True

    def __post_init__(self):
        require(self, steps=("interval",))
        if not isfinite(self.s_init):
            raise ValueError(f"STR: s_init={self.s_init} is no finite number")

    def companions(self, layers, masks):
        # two dimensions, as in the authors' code, so that optimizers which spare vectors decay it
        return {name: {"threshold": layer.weight.new_full((1, 1), self.s_init)} for name, layer in layers.items()}

    def effective(self, weight, threshold):
        threshold = threshold.view([1] * weight.ndim)
        return weight.sign() * (weight.abs() - threshold.sigmoid()).relu()  # S_g(w, s), Eq. 3, with g the sigmoid

    def init(self, layers, rng):
        companions = self.companions(layers, {})
        return {name: self.effective(layer.weight, **companions[name]) != 0 for name, layer in layers.items()}

    def is_update(self, step):
        return Every(self.interval)(step)

    def update(self, step, layers, masks, rng):
        return {name: criterion.effective(layer) != 0 for name, layer in layers.items()}

    def final_counts(self, shapes):
        return None

    def sparsity_at(self, step):
        return None
