"""CHT, CHTs and CHTss, Cannistraci-Hebb training: layers grow the links that their own topology predicts.

Zhang, Zhao, Wu, Muscoloni & Cannistraci, "Epitopological learning and Cannistraci-Hebb network shape intelligence
brain-inspired theory for ultra-sparse advantage in deep learning", ICLR 2024 (CHT).
Zhang, Cerretti, Zhao, Wu, Liao, Michieli & Cannistraci, "Brain network science modelling of sparse neural networks
enables Transformers and LLMs to perform as fully connected", NeurIPS 2025. https://arxiv.org/abs/2501.19107
"""

from dataclasses import dataclass

from granet import bipartite, criterion, distribution, shards, topology
from granet.methods.base import METHODS, Method, Steps, require, require_at_least
from granet.schedule import Cosine, Every, Sigmoid


@METHODS.add("chtss")
@dataclass(frozen=True, kw_only=True)
class CHTss(Method):
    """Every `interval` steps, each layer replaces its least important weights by the links its topology predicts.

    No gradient is looked at. CHTss draws at random what goes and what comes, by importance and by prediction, and its
    density falls along a sigmoid from `initial_sparsity` to `end`. `initial_sparsity=None` is CHTs, at a constant
    density. CHT is `initial_sparsity=None, soft=False, predictor="ch3-l3p", anneal=False`.

    Args:
        sparsity: share of inactive weights among the sparse parameters at the end of training, in [0, 1).
        initial_sparsity: share of inactive weights at the start (s_i); None starts as sparse as it ends.
        end: step from which the topology is fixed, and at which `sparsity` is reached (T_end).
        interval: steps between two updates of the topology (Delta-T).
        drop_fraction: share of a layer's active weights that are replaced at an update (zeta).
        anneal: let that share fall to 0 along a cosine towards `end`.
        predictor: what new links are predicted by: "ch2-l3n", "ch3-l3n", "ch2-l3p" or "ch3-l3p"; those in n look at
            nodes and take products of matrices, those in p look at paths and take many times as long.
        soft: draw the weights that stay and those that grow at random, with probabilities by their scores; otherwise
            the highest scores win.
        sharpness: exponent of a weight's importance in its probability to stay, at first (only with soft=True).
        final_sharpness: the same at `end`; in between it changes along a line.
        relative_importance: what removal goes by: 0 is magnitude, 1 is magnitude relative to all weights of the same
            output and of the same input, and numbers between them mix the two (1 - alpha).
        receptive_field: start from links between outputs and inputs that are near each other (BRF), with a randomness
            from 0 to 1 (r); None starts at random places.
        distribution: how the active weights are shared among layers: "erk", "er", "uniform", or densities by layer,
            such as "conv1.*=0.5, *=0.1".
    """

    sparsity: float
    initial_sparsity: float | None = 0.5  # s_i
    end: Steps  # T_end
    interval: Steps = 100  # Delta-T
    drop_fraction: float = 0.3  # zeta
    anneal: bool = True
    predictor: str = "ch2-l3n"
    soft: bool = True
    sharpness: float = 1.0
    final_sharpness: float = 9.0
    relative_importance: float = 0.0  # 1 - alpha
    receptive_field: float | None = None  # r
    distribution: str = "uniform"

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("drop_fraction", "relative_importance"), steps=("end", "interval"))
        require_at_least(self, 0, "sharpness", "final_sharpness")
        distribution.named(self.distribution)
        bipartite.predictor(self.predictor)
        if self.receptive_field is not None:
            require(self, share=("receptive_field",))
        if self.initial_sparsity is not None:
            require(self, sparsity=("initial_sparsity",))
            if self.initial_sparsity > self.sparsity:
                raise ValueError(
                    f"CHTss: initial_sparsity={self.initial_sparsity} must not exceed sparsity={self.sparsity}"
                )
        if not self.soft and (self.sharpness, self.final_sharpness) != (1.0, 9.0):
            raise ValueError("CHTss: sharpness and final_sharpness have an effect with soft=True alone")

    def initial_counts(self, shapes):
        return self._counts(shapes, 0)

    def final_counts(self, shapes):
        return self._counts(shapes, self.end)

    def _counts(self, shapes, step):
        return distribution.named(self.distribution)(shapes, 1 - self.sparsity_at(step))

    def init(self, layers, rng):
        if self.receptive_field is None:
            return super().init(layers, rng)
        shapes = topology.shapes_of(layers)
        return bipartite.receptive_fields(self.initial_counts(shapes), shapes, self.receptive_field, rng)

    def is_update(self, step):
        decays = self.initial_sparsity is not None
        return Every(self.interval, end=self.end, land=decays)(step) and (decays or step < self.end)

    def update(self, step, layers, masks, rng):
        # density decay: each layer keeps the weights of largest relative importance, until s_t is reached
        if self.initial_sparsity is not None:
            counts = self._counts(topology.shapes_of(layers), step)
            scored = {name: criterion.Layer(_importance(layer, 1.0)) for name, layer in layers.items()}
            masks = topology.prune_each(masks, counts, scored, criterion.own_values)

        # Cannistraci-Hebb training: each layer trades its least important links for the likeliest
        return {name: self._rewired(masks[name], layer, step, rng) for name, layer in layers.items()}

    def _rewired(self, mask, layer, step, rng):
        active = topology.count(mask)
        n = topology.part(self.regeneration_at(step), active)
        if n == 0 or active == mask.numel():
            return mask
        importance = _importance(layer, self.relative_importance)
        if self.soft:
            importance = topology.draw(importance, rng, self.sharpness_at(step))
        kept = topology.drop(mask, importance, n)

        predict = bipartite.predictor(self.predictor)
        likelihood = shards.place_like(predict(shards.gather(kept)), kept)
        if self.soft:
            likelihood = topology.draw(likelihood, rng)
        return topology.grow(kept, likelihood, n)

    def sparsity_at(self, step):
        if self.initial_sparsity is None:
            return self.sparsity
        return Sigmoid(self.initial_sparsity, self.sparsity, 0, self.end)(step)

    def regeneration_at(self, step):
        if step >= self.end:
            return 0.0
        return Cosine(self.drop_fraction, self.end)(step) if self.anneal else self.drop_fraction

    def sharpness_at(self, step):
        """Returns the exponent of a weight's importance in its probability to stay, in an update at `step`."""
        return self.sharpness + (self.final_sharpness - self.sharpness) * min(1.0, step / self.end)


def _importance(layer, relative):
    """How important each weight is: by magnitude, or by magnitude relative to its output's and its input's weights."""
    size = criterion.magnitude(layer)
    if relative == 0:
        return size
    whole = shards.gather(size)
    links = whole.reshape(len(whole), -1).double()  # so that what is equal on paper is equal in float32
    beside = ((1 - relative + relative * links.sum(dim, keepdim=True)).clamp(min=1e-30) for dim in (0, 1))
    score = sum(links / weights for weights in beside)
    return shards.place_like(score.float().view(whole.shape), size)
