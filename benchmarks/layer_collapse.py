"""Which methods cut a network in two: what pruning at initialisation leaves of each layer of VGG-19.

    python benchmarks/layer_collapse.py [--rounds 50] [--threads 1] [--out results/layer-collapse.md]

SNIP, iterative SNIP, GraSP and SynFlow against random topologies, at 90 to 99.5 % sparsity, for one initialisation and
one batch of the first dataset found among CIFAR-10, Fashion-MNIST and the digits (`GRANET_DATA`; grey images are
resized to 32x32). A weight counts as on a path if, with every active weight set to 1, something flows through it from
the input to the output; a network without such weights is cut. Nothing is trained here.
"""

import argparse
import copy
import os
import platform
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from granet import SNIP, GraSP, Probe, Static, SynFlow
from granet.selection import layers_of, select
from granet.text import columns
from granet.topology import count
from granet.train import data, models

SPARSITIES = (0.9, 0.95, 0.98, 0.99, 0.995)
SNIP_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class Remembering(Probe):
    """A probe that looks at the dense network once, whatever the sparsity asked for afterwards."""

    known: dict = field(default_factory=dict)

    def _once(self, key, masks, ask):
        if not all(mask.all() for mask in masks.values()):
            return ask()
        if key not in self.known:
            self.known[key] = ask()
        return self.known[key]

    def gradients(self, masks):
        return self._once("g", masks, lambda: super(Remembering, self).gradients(masks))

    def hessian_gradient(self, masks, temperature):
        return self._once("Hg", masks, lambda: super(Remembering, self).hessian_gradient(masks, temperature))


def images(per_class):
    """The name of the dataset, and its first `per_class` training images of each class with their labels, 32x32."""
    name = next(name for name in ("cifar10", "fashion-mnist", "digits") if data.DATASETS[name].locate())
    train = data.load(name, validation=0).train
    rows = torch.cat([(train.labels == label).nonzero()[:per_class, 0] for label in range(10)])
    source = data.DATASETS[name]
    batches = data.epoch_batches(train[rows], batch_size=len(rows), train=False, mean=source.mean, std=source.std)
    x, y = next(iter(batches))
    return name, F.interpolate(x, (32, 32), mode="bilinear") if x.shape[-1] != 32 else x, y


def on_paths(model, masks):
    """How many active weights lie on a path from the input to the output."""
    ones = copy.deepcopy(model)
    for key, p in ones.named_parameters():
        torch.nn.init.constant_(p, 0.0 if key.endswith("bias") else 1.0)  # a bias starts a flow of its own
    flow = Probe(ones, example=torch.ones(1, *model.example)).synaptic_flow(masks)
    return sum(int((values > 0).sum()) for values in flow.values())


def verdict(rows):
    """Two sentences on which methods cut the network at which sparsity, from the rows of the table below its head."""
    cut = {}
    for title, sparsity, *_, path, _, _ in rows:
        cut.setdefault(title, []).extend([sparsity] if path == "none" else [])
    collapsed = "; ".join(f"{title} at {', '.join(at)}" for title, at in cut.items() if at) or "nothing"
    connected = "; ".join(title for title, at in cut.items() if not at) or "nothing"
    return f"Cut in two, without a path from input to output: {collapsed}. Connected at every sparsity: {connected}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="of SynFlow; the paper's number is 100")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    began = time.process_time()
    name, x, y = images(10)
    torch.manual_seed(args.seed)
    model = models.build("vgg19", classes=10, in_channels=x.shape[1])
    model.example = x.shape[1:]
    layers = layers_of(select(model))
    total = sum(layer.numel() for layer in layers.values())
    whole, few = Remembering(model, [(x, y)]), Remembering(model, [(x[::5], y[::5])])
    methods = {
        "SNIP": (SNIP, {}, whole),
        f"SNIP, {SNIP_ROUNDS} rounds": (SNIP, {"rounds": SNIP_ROUNDS}, few),
        "GraSP": (GraSP, {}, whole),
        f"SynFlow, {args.rounds} rounds": (SynFlow, {"rounds": args.rounds}, whole),
        "random, ERK": (Static, {"distribution": "erk"}, None),
        "random, uniform": (Static, {"distribution": "uniform"}, None),
    }
    rows = [["method", "sparsity", "compression", "smallest", "< 1 %", "<= 1", "path", "on a path", "effective"]]
    profiles = [["layer", "weights", *methods]]
    at_99 = {}
    for title, (kind, settings, probe) in methods.items():
        for sparsity in SPARSITIES:
            method = kind(sparsity=sparsity, **settings)
            rng = torch.Generator().manual_seed(args.seed)
            masks = method.init(layers, rng, probe) if method.needs_probe else method.init(layers, rng)
            counts = {key: count(mask) for key, mask in masks.items()}
            active, alive = sum(counts.values()), on_paths(model, masks)
            starved = sum(n < layers[key].numel() / 100 for key, n in counts.items())
            rows.append(
                [
                    title,
                    f"{sparsity:.1%}",
                    f"{total / active:.0f}x",
                    f"{min(counts.values()):,}",
                    str(starved),
                    str(sum(n <= 1 for n in counts.values())),
                    "yes" if alive else "none",
                    f"{alive / active:.1%}",
                    f"{total / alive:.0f}x" if alive else "-",
                ]
            )
            print(*rows[-1], f"({time.process_time() - began:.0f} s)", sep="  ", flush=True)
            if sparsity == 0.99:
                at_99[title] = counts
    for key, layer in layers.items():
        profiles.append([key, f"{layer.numel():,}", *(f"{at_99[title][key]:,}" for title in methods)])

    text = "\n".join(
        [
            f"# Layer collapse: VGG-19, {total:,} weights in {len(layers)} layers, pruned at initialisation",
            "",
            f"`python benchmarks/layer_collapse.py --rounds {args.rounds} --threads {args.threads} "
            f"--seed {args.seed}`, {date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
            f"torch {torch.__version__}, "
            f"{time.process_time() - began:.0f} s of processor time.",
            f"Data: {name}, {len(y)} training images, 10 of each class (2 of each for the rounds of SNIP).",
            "",
            "`smallest`: active weights of the smallest layer; `< 1 %` and `<= 1`: layers that keep fewer than 1 % of",
            "their weights, or at most one; `path`: whether any path of active weights leads from the input to the",
            "output; `on a path`: the share of the active weights that lie on one; `effective`: compression, if only",
            "those are counted. granet leaves every layer at least one weight: a layer that collapsed has one here.",
            "",
            verdict(rows[1:]),
            "",
            "```",
            columns(rows, right=range(1, 9)),
            "```",
            "",
            "## Active weights of each layer at 99 %",
            "",
            "```",
            columns(profiles, right=range(1, len(profiles[0]))),
            "```",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
