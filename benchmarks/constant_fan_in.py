"""What a constant fan-in and ablated neurons gain in inference: an MLP of 784-4096-4096-10, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/constant_fan_in.py --sparsity 0.9 0.95 0.98 --batch 1 64

The last layer is dense, and the hidden layers of all networks have equally many active weights. "random" has them at
any places, "fan-in" the same number in every neuron. "ablated" has none in 30 % of the hidden neurons and more in the
others, and "shrunk" is that network after `granet.shrink`. All these run by `granet.compile`. "bag" is the constant
fan-in as two tables without row pointers, of indices and of weights, run by torch's `embedding_bag`; "CSR" is the
random one as torch's compressed sparse rows.
"""

import argparse
import time

import torch
from engine_inference import CsrLinear, measure, processor
from torch import nn

import granet
from granet.topology import in_rows, random_masks, random_rows


class Bag(nn.Module):
    """A linear layer in which every neuron has equally many weights."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        rows = [row.nonzero().flatten() for row in layer.weight]
        self.inputs = torch.stack(rows)
        self.weight, self.bias = layer.weight.detach().gather(1, self.inputs), layer.bias.detach()

    def forward(self, x):
        found = nn.functional.embedding_bag(self.inputs, x.T.contiguous(), mode="sum", per_sample_weights=self.weight)
        return found.T + self.bias


def network(sparsity: float, structure: str) -> nn.Sequential:
    """The network with random weights, none of which is zero by chance, in masks of the given structure."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)
    ).eval()  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for at in (0, 2):
            layer = granet.criterion.Layer(model[at].weight)
            rows, columns = layer.shape
            dead = round(0.3 * rows) if structure == "ablated" else 0
            fan_in = round((1 - sparsity) * columns * rows / (rows - dead))
            if structure == "random":
                n = round((1 - sparsity) * columns) * rows
                mask = random_masks({"w": n}, {"w": layer.shape}, rng)["w"]
            else:
                alive = torch.ones(rows, dtype=torch.bool)
                alive[torch.randperm(rows)[:dead]] = False
                mask = in_rows(random_rows({"w": fan_in}, {"w": layer}, rng)["w"], alive)
            model[at].weight.mul_(mask)
    return model


def replaced(model: nn.Sequential, kind: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(kind(one) if isinstance(one, nn.Linear) else one for one in model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--seconds", type=float, default=10, help="for each sparsity and batch")
    settings = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, wall time\n")
    print("| sparsity | batch | network | min ms | median ms | repeats | vs random |\n|---|---|---|--:|--:|--:|--:|")
    for sparsity in settings.sparsity:
        models = {name: network(sparsity, name) for name in ("random", "fan-in", "ablated")}
        for batch in settings.batch:
            x = torch.randn(batch, 784)
            with torch.no_grad():
                models["shrunk"] = granet.shrink(models["ablated"], x).model.eval()
                fast = {name: granet.compile(model, x) for name, model in models.items()}
                fast |= {"bag": replaced(models["fan-in"], Bag), "CSR": replaced(models["random"], CsrLinear)}
                same = models | {"bag": models["fan-in"], "CSR": models["random"]}
                for name, one in fast.items():
                    torch.testing.assert_close(one(x), same[name](x), rtol=1e-3, atol=1e-4)
                calls = {name: lambda f=one, x=x: f(x) for name, one in fast.items()}
                calls["dense"] = lambda model=models["random"], x=x: model(x)
                times = measure(calls, settings.seconds, time.perf_counter)
            for name, (least, median, repeats) in times.items():
                print(
                    f"| {sparsity:.0%} | {batch} | {name} | {least:.3f} | {median:.3f} | {repeats} "
                    f"| {times['random'][0] / least:.2f}x |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
