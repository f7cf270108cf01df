"""Write a sparse training method of your own, register it, and train with it, without changing granet.

    python examples/own_method.py --steps 300
    GRANET_PLUGINS=examples/own_method.py granet train digits --method weakest-link --train.epochs 3

The method drops, at each update, the smallest weights of every layer, and regrows as many at random among those that
have *not* just been dropped. Training uses scikit-learn's handwritten digits, so nothing is downloaded.
"""

import argparse
from dataclasses import dataclass

import granet
from granet import criterion, distribution, topology
from granet.methods.base import Steps, require


@granet.register("weakest-link")
@dataclass(frozen=True, kw_only=True)
class WeakestLink(granet.Method):
    """Every `interval` steps, each layer replaces its smallest weights by random ones that were not active before.

    Args:
        sparsity: share of inactive weights among the sparse parameters, in [0, 1).
        total: length of training, in steps; no update comes after three quarters of it.
        interval: steps between two updates of the topology.
        fraction: share of a layer's active weights that is replaced at an update.
    """

    sparsity: float
    total: Steps
    interval: Steps = 100
    fraction: float = 0.2

    def __post_init__(self):
        require(self, sparsity=("sparsity",), share=("fraction",), steps=("total", "interval"))

    def initial_counts(self, shapes):
        """How many weights are active in each layer at the start."""
        return distribution.erk(shapes, 1 - self.sparsity)

    def is_update(self, step):
        """Whether the masks change after this optimizer step."""
        return step % self.interval == 0 and step <= 0.75 * self.total

    def update(self, step, layers, masks, rng):
        """The new masks. A method writes into no tensor that it is given."""
        new = {}
        for name, layer in layers.items():
            mask = masks[name]
            active, places = topology.count(mask), mask.numel()
            n = min(topology.part(self.fraction, active), places - active)  # so many places are free
            kept = topology.drop(mask, criterion.magnitude(layer), n)
            grown = topology.grow_random(mask, n, rng) & ~mask
            new[name] = kept | grown
        return new

    def sparsity_at(self, step):
        """The sparsity at a step, which is constant."""
        return self.sparsity

    def regeneration_at(self, step):
        """The share of its active weights that a layer exchanges."""
        return self.fraction


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Trains with RigL and with the method above, and returns name to (test accuracy, sparsity)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of weights that are zero")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (22 are an epoch)")
    args = parser.parse_args(arguments)

    from image_classifier import train  # the loop of another example

    interval = max(1, args.steps // 20)
    methods = {
        "rigl": granet.RigL(sparsity=args.sparsity, end=max(1, args.steps * 3 // 4), interval=interval),
        # the registry has the method now, as granet's command line and recipes see it
        "weakest-link": granet.METHODS["weakest-link"](sparsity=args.sparsity, total=args.steps, interval=interval),
    }
    results = {name: train(method, args.steps) for name, method in methods.items()}
    print(f"{'method':<14} {'accuracy':>9} {'sparsity':>9}")
    for name, (accuracy, sparsity) in results.items():
        print(f"{name:<14} {accuracy:>9.2%} {sparsity:>9.2%}")
    return results


if __name__ == "__main__":
    main()
