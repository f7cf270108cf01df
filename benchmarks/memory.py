"""Peak memory and speed of training with dense weights, with masks over them, and in sparse storage.

Each row is a fresh process that takes a few steps; its peak is the largest resident memory that the system reports,
less what the process had after its imports. A row says as well what weights, gradients and optimizer state take by
arithmetic: four bytes for each number, and four for the position of each weight in sparse storage.

    python benchmarks/memory.py                     # all networks, at 90 %
    python benchmarks/memory.py mlp --sparsity 0.95
    python benchmarks/memory.py gpt --bf16          # under bfloat16 autocast

If SparseLab is installed, networks of linear layers alone train with it as well: RigL, with its own layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

STEPS, BYTES = 8, 4


def mlp():
    """Four layers of 4096 x 4096."""
    import torch
    from torch import nn

    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(4096, 4096), nn.ReLU())])
    return model, lambda: model(torch.randn(128, 4096)).square().mean()


def classifier():
    """An extreme classifier: 512 features, 64k outputs."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 65536))
    return model, lambda: F.cross_entropy(model(torch.randn(32, 512)), torch.randint(0, 65536, (32,)))


def gpt():
    """A GPT of 12 blocks of width 768 (85 million weights) on the bytes of this machine's Python library."""
    from pathlib import Path

    import torch
    from torch import nn
    from torch.nn import functional as F

    text = b"".join(path.read_bytes() for path in sorted(Path(statistics.__file__).parent.glob("*.py")))
    data, width, length, batch = torch.frombuffer(bytearray(text), dtype=torch.uint8), 768, 128, 4

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (12, -1)).transpose(1, 2) for t in self.qkv(self.one(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.out(y)
            return x + self.down(F.gelu(self.up(self.two(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(12))), nn.LayerNorm(width)

        def forward(self, tokens):
            x = self.blocks(self.tokens(tokens) + self.places.weight)
            return self.norm(x) @ self.tokens.weight.T

    model = GPT()

    def loss():
        at = torch.randint(0, len(data) - length - 1, (batch,)).tolist()
        x = torch.stack([data[i : i + length + 1] for i in at]).long()
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    return model, loss


def vgg19():
    """VGG-19 on 32 x 32 images, 64 at a time: bound by its activations."""
    import torch
    from torch.nn import functional as F

    from granet.train.models import build

    model = build("vgg19", classes=10, in_channels=3).to(memory_format=torch.channels_last)
    return model, lambda: F.cross_entropy(model(images()), torch.randint(0, 10, (64,)))


def images():
    """What VGG-19 gets."""
    import torch

    return torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)


NETWORKS = {"mlp": mlp, "gpt": gpt, "classifier": classifier, "vgg19": vgg19}
WAYS = ("dense", "masked", "sparse", "accelerated")  # the last: sparse, and granet.accelerate for convolutions


def resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def with_sparselab(model, sparsity: float):
    """The model with SparseLab's layers in the place of linear ones, and its RigL."""
    import sparselab
    from torch import nn

    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            model[i] = sparselab.SparseLinear(layer.in_features, layer.out_features, sparsity=sparsity)
    rigl = sparselab.RigL(sparsity=sparsity, drop_fraction=0.3, update_freq=4)
    model.apply(rigl)
    return rigl


def measure(network: str, way: str, optimizer: str, sparsity: float, bf16: bool) -> dict:
    """One row, in this process."""
    import torch

    import granet

    torch.set_num_threads(2)
    torch.manual_seed(0)
    before = resident()
    model, loss = NETWORKS[network]()
    total = sum(p.numel() for p in model.parameters())
    sparsifier = other = None
    if way == "sparselab":
        other = with_sparselab(model, sparsity)
    elif way != "dense":
        method = granet.RigL(sparsity=sparsity, end=STEPS, interval=4, distribution="uniform")
        sparsifier = granet.Sparsifier(model, method, storage="dense" if way == "masked" else "sparse")
    rate = {"lr": 1e-3}
    kinds = {"adamw": (torch.optim.AdamW, rate, 2), "sgd": (torch.optim.SGD, rate | {"momentum": 0.9}, 1)}
    kind, settings, moments = kinds[optimizer]
    trained = kind(model.parameters(), **settings)
    if sparsifier is not None:
        sparsifier.attach(trained)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    if way == "accelerated":
        with autocast:
            granet.accelerate(sparsifier, images())
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        with autocast:
            found = loss()
        found.backward()
        del found
        trained.step()
        if other is not None:
            other.step()
        trained.zero_grad()
        times.append(time.perf_counter() - start)
    held = sum(p.numel() for p in model.parameters())
    stored = sparsifier.active if way in ("sparse", "accelerated") else held if way == "sparselab" else 0
    plain = [t for i, t in enumerate(times) if i % 4 in (1, 2)]  # neither the first step nor one with an update
    return {
        "peak": resident() - before,
        "state": BYTES * (held * (2 + moments) + stored),
        "dense_state": BYTES * total * (2 + moments),
        "least_ms": 1e3 * min(plain),
        "median_ms": 1e3 * statistics.median(plain),
        "update_ms": 1e3 * times[3],
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[], help=f"some of {', '.join(NETWORKS)}; all without any")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9], help="shares of inactive weights")
    parser.add_argument("--optimizer", nargs="+", default=["adamw"], choices=["adamw", "sgd"], help="optimizers")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(*json.loads(given.row))))
        return
    if unknown := set(given.networks) - set(NETWORKS):
        parser.error(f"unknown network {min(unknown)!r}: choose from {', '.join(NETWORKS)}")
    print(f"{platform.processor() or platform.machine()}, two threads, {STEPS} steps of RigL in a process of its own\n")
    print(
        "| network | optimizer | sparsity | way | peak MiB | of dense | state MiB | of dense | step ms | with update |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for network in given.networks or NETWORKS:
        for optimizer in given.optimizer:
            for sparsity in given.sparsity:
                dense = None
                theirs = ["sparselab"] if network in ("mlp", "classifier") and find_spec("sparselab") else []
                for way in [*(WAYS if network == "vgg19" else WAYS[:3]), *theirs]:
                    row = json.dumps([network, way, optimizer, sparsity, given.bf16])
                    done = subprocess.run([sys.executable, __file__, "--row", row], capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stderr)
                    found = json.loads(done.stdout.splitlines()[-1])
                    dense = dense or found
                    print(
                        f"| {network} | {optimizer} | {sparsity:g} | {way} | {found['peak'] / 2**20:,.0f} "
                        f"| {found['peak'] / dense['peak']:.2f} | {found['state'] / 2**20:,.0f} "
                        f"| {found['state'] / found['dense_state']:.3f} | {found['least_ms']:.0f} "
                        f"({found['median_ms']:.0f}) | {found['update_ms']:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
