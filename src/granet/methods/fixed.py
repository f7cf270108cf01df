"""Fixed: the topology that a network has already, kept while it is fine-tuned."""

from dataclasses import dataclass

from granet import topology
from granet.methods.base import METHODS, Method


@METHODS.add("fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(Method):
    """Keep the zeros that the model has: what is zero at the start stays zero, and all other weights train."""

    def init(self, layers, rng):
        masks = {name: layer.weight != 0 for name, layer in layers.items()}
        for name, mask in masks.items():
            if not topology.count(mask):
                raise ValueError(
                    f"Fixed keeps the weights that are not zero, and {name!r} has none: load the pruned weights before "
                    f"the sparsifier is made, or leave it alone with skip={name!r}"
                )
        return masks

    def initial_counts(self, shapes):
        return None

    def sparsity_at(self, step):
        return None
