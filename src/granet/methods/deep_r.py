"""Deep R, deep rewiring: connections keep their sign, wander, and are rewired where they would change it.

Bellec, Kappel, Maass & Legenstein, "Deep Rewiring: Training very sparse deep networks", ICLR 2018.
https://arxiv.org/abs/1711.05136
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from granet import distribution, topology
from granet.methods.base import METHODS, Method, require, require_at_least


@METHODS.add("deep-r")
@dataclass(frozen=True, kw_only=True)
class DeepR(Method):
    """At every step, drop the weights that would cross zero and reactivate as many at random places.

    A weight is `w = s * theta` with a sign `s` that it keeps for life. After the optimizer's step `theta` is pulled
    towards zero (`l1`) and disturbed by noise (`temperature`); a connection with `theta < 0` is dormant. A reactivated
    connection starts from zero with a random sign.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1); the same throughout training.
        l1: strength of the pull of the active weights towards zero (alpha).
        temperature: temperature of the noise (T): its standard deviation in a step is sqrt(2 * learning rate * T).
        distribution: how the active weights are shared among layers at the start: "erk", "er", "uniform", or
            densities by layer, such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    l1: float = 1e-5  # alpha
    temperature: float = 2.5e-11  # T: the noise of a step has the deviation sqrt(2 * eta * T)
    distribution: str = "erk"

    remembers: ClassVar[bool] = True
    drifts: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",))
        require_at_least(self, 0, "l1", "temperature")
        distribution.named(self.distribution)

    def initial_counts(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def is_update(self, step):
        return step > 0

    def drift(self, step, layers, masks, rng, lr, memory):
        import torch

        changes = {}
        for name, layer in layers.items():
            w, eta = layer.weight.detach(), lr[name]
            s = memory[name] if name in memory else _sign(w)
            # in the middle of a score's interval; the last one would round to 1, whose quantile is infinite
            nu = torch.special.ndtri((topology.random_scores(w, rng) + 2**-25).clamp(max=1 - 2**-24))
            change = sqrt(2 * eta * self.temperature) * nu - eta * self.l1 * s
            dormant = (w + change) * s < 0  # theta < 0: the sign is forgotten, the weight zero
            changes[name] = torch.where(dormant, -w, change)
            memory[name] = s.masked_fill(dormant, 0)
        return changes

    def update(self, step, layers, masks, rng, memory):
        import torch

        after = {}
        for name, layer in layers.items():
            s = memory[name] if name in memory else _sign(layer.weight)
            alive = masks[name] & (s != 0)
            n = topology.count(masks[name]) - topology.count(alive)
            after[name] = topology.grow_random(alive, n, rng) if n else masks[name]
            if n:
                coin = (topology.random_scores(layer.weight, rng) < 0.5).to(s.dtype) * 2 - 1
                memory[name] = torch.where(alive, s, coin) * after[name]
        return after

    def sparsity_at(self, step):
        return self.sparsity


def _sign(w):
    """The signs of `w` as -1, 0 and 1, one byte each."""
    import torch

    return w.detach().sign().to(torch.int8)
