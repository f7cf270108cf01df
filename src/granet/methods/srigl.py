"""SRigL: RigL in which all neurons of a layer have equally many weights, and those with little to say are ablated.

Lasby, Golubeva, Evci, Nica & Ioannou, "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.
https://arxiv.org/abs/2305.02299
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from granet import criterion, distribution, topology
from granet.methods.base import METHODS, Method, Steps, require
from granet.schedule import Cosine, Every


@METHODS.add("srigl")
@dataclass(frozen=True, kw_only=True)
class SRigL(Method):
    """Every `interval` steps until `end`, each layer exchanges weights as in RigL, with a constant fan-in.

    A neuron is an index of a weight's first dimension: an output of a linear layer, a filter of a convolution. All
    neurons of a layer have equally many active weights, except those that are ablated, which have none. Where the
    topology is updated, the optimizer does not step.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1). Each layer gets the largest constant
            fan-in that its budget allows, so the network can be sparser by less than one weight for each neuron.
        end: step from which the topology is fixed (T_end).
        interval: steps between two updates of the topology (Delta-T).
        drop_fraction: share of a layer's active weights that are replaced at the first update (alpha); falls to 0
            along a cosine.
        min_salient: how many salient weights a neuron needs in order not to be ablated, as a share of the fan-in before
            any ablation (gamma_sal); 0 ablates no neuron.
        distribution: how the active weights are shared among layers: "erk", "er", "uniform", or densities by layer,
            such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    end: Steps  # T_end
    interval: Steps = 100  # Delta-T
    drop_fraction: float = 0.3  # alpha
    min_salient: float = 0.3  # gamma_sal
    distribution: str = "erk"

    needs_dense_grad: ClassVar[bool] = True
    replaces_step: ClassVar[bool] = True

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction", "min_salient"), steps=("end", "interval"))
        distribution.named(self.distribution)

    def _budgets(self, shapes):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity)

    def initial_counts(self, shapes):
        fan_in = distribution.fan_ins(shapes, self._budgets(shapes))
        return {name: k * shapes[name][0] for name, k in fan_in.items()}

    def final_counts(self, shapes):
        counts = self.initial_counts(shapes)
        return None if self.min_salient else counts  # how many neurons are ablated is an outcome

    def init(self, layers, rng):
        shapes = topology.shapes_of(layers)
        return topology.random_rows(distribution.fan_ins(shapes, self._budgets(shapes)), layers, rng)

    def is_update(self, step):
        return Every(self.interval, end=self.end - 1)(step)

    def update(self, step, layers, masks, rng):
        budgets, alpha = self._budgets(topology.shapes_of(layers)), self.regeneration_at(step)
        *_, last = layers  # its neurons are the outputs of the network
        return dict(masks) | {
            name: self._exchanged(masks[name], layer, budgets[name], alpha, ablates=name != last)
            for name, layer in criterion.with_gradient(layers).items()
        }

    def _exchanged(self, mask, layer, budget, alpha, ablates):
        # the salient weights are those that RigL would have: the largest of today's, and the steepest of the others
        salient = topology.exchange(mask, layer, alpha, lose=criterion.magnitude, gain=criterion.gradient)
        alive = self._alive(topology.row_counts(salient), budget, layer.shape, ablates)
        k = min(budget // topology.count(alive), prod(layer.shape[1:]))  # the new constant fan-in

        # the K smallest weights of the layer go, first those of ablated neurons, and what a neuron has beyond k
        active = topology.count(mask)
        kept = topology.in_rows(mask, alive)
        n = min(active - topology.part(alpha, active), topology.count(kept))
        kept = topology.top([layer], criterion.magnitude, n, [kept])[0]
        kept = topology.top_of_rows(layer, criterion.magnitude, topology.row_counts(kept).clamp(max=k), kept)

        # each neuron that is alive grows its weights of largest gradient until it has k
        return kept | topology.top_of_rows(layer, criterion.gradient, alive * k - topology.row_counts(kept), ~kept)

    def _alive(self, salient, budget, shape, ablates):
        """Which neurons are not ablated, from their numbers of salient weights; enough of them to hold the budget."""
        if not (self.min_salient and ablates):
            return salient >= 0
        k = budget // shape[0]  # the constant fan-in if no neuron is ablated
        alive = salient >= max(1, topology.part(self.min_salient, k))
        least = -(-budget // prod(shape[1:]))
        if topology.count(alive) >= least:
            return alive
        return topology.top([criterion.Layer(salient)], criterion.own_values, least, [salient >= 0])[0]

    def sparsity_at(self, step):
        return self.sparsity

    def regeneration_at(self, step):
        return Cosine(self.drop_fraction, self.end)(step)
