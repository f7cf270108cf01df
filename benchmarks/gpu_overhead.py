"""What keeping a network sparse costs beside training it, on a GPU: every step, and a topology update.

    python benchmarks/gpu_overhead.py [--model resnet50] [--size 224] [--batch 128] [--out results/gpu-overhead.md]

Each model trains on random images under bfloat16 autocast, channels last, with SGD and momentum. A dense step and a
step with granet's masks run in turn, in short stretches, timed by the GPU's own clock; minimum and median are shown.
The masked weights are checked after the timing: exact counts, and every inactive weight and its momentum zero.
"""

import argparse
import statistics
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import granet
from granet.text import columns
from granet.train import models


def trainer(name, size, batch, *, method=None, fused=False):
    """A function that takes one training step, and its sparsifier, if it has a method."""
    torch.manual_seed(0)
    model = models.build(name, classes=1000, in_channels=3).cuda().to(memory_format=torch.channels_last)
    sparsifier = None if method is None else granet.Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=fused)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    x = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(1000, (batch,), device="cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sparsifier


def milliseconds(step, count):
    """Milliseconds a step, of `count` in a row, by the GPU's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def compared(name, size, batch, repeats, stretch):
    """Rows of the table of steps: the model dense and with masks, under both forms of SGD."""
    for fused in (False, True):
        method = granet.RigL(sparsity=0.9, end=10**6, interval=10**5)  # no update while it is timed
        sparse, sparsifier = trainer(name, size, batch, method=method, fused=fused)
        dense, _ = trainer(name, size, batch, fused=fused)
        for step in (dense, sparse):
            milliseconds(step, stretch)
        taken = {"dense": [], "90 % sparse": []}
        for _ in range(repeats):
            taken["dense"].append(milliseconds(dense, stretch))
            taken["90 % sparse"].append(milliseconds(sparse, stretch))
        sparsifier.verify()
        base = statistics.median(taken["dense"])
        for label, times in taken.items():
            middle = statistics.median(times)
            form = "fused SGD" if fused else "SGD"
            yield [f"{name} b{batch}", form, label, f"{min(times):.2f}", f"{middle:.2f}", f"{middle / base - 1:+.1%}"]
        del dense, sparse, sparsifier


def updates(name, size, batch, repeats):
    """Rows of the table of updates: a step with one, less a step without."""
    cases = {
        "RigL": granet.RigL(sparsity=0.9, end=10**6, interval=2),
        "GraNet": granet.GraNet(sparsity=0.9, initial_sparsity=0.5, end=10**6, total=2 * 10**6, interval=2),
    }
    for label, method in cases.items():
        step, sparsifier = trainer(name, size, batch, method=method)
        for _ in range(6):
            step()
        torch.cuda.synchronize()
        with_update, without = [], []
        for _ in range(2 * repeats):
            due = sparsifier.update_due
            (with_update if due else without).append(milliseconds(step, 1))
        sparsifier.verify()
        least, middle = min(with_update) - min(without), statistics.median(with_update) - statistics.median(without)
        yield [f"{name} b{batch}", label, f"{sparsifier.total:,}", f"{least:.2f}", f"{middle:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet50", "vgg19", "resnet20"])
    parser.add_argument("--size", nargs="+", type=int, default=[224, 32, 32], help="side of the images, per model")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--stretch", type=int, default=10, help="steps timed together")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and there is none here; benchmarks/upkeep.py measures the processor")
    networks = list(zip(arguments.model, arguments.size, strict=True))
    steps, changes = [], []
    for name, size in networks:
        stretch = arguments.stretch if size > 64 else 3 * arguments.stretch
        steps += compared(name, size, arguments.batch, arguments.repeats, stretch)
        changes += updates(name, size, arguments.batch, arguments.repeats)
    where = f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    text = "\n".join(
        [
            "# Upkeep of the masks on a GPU",
            "",
            f"`python benchmarks/gpu_overhead.py`, {where}.",
            "",
            "## A training step",
            "```",
            columns([["network", "optimizer", "weights", "min ms", "median ms", "against dense"], *steps]),
            "```",
            "## A topology update (beside the step that it comes with)",
            "```",
            columns([["network", "method", "sparse weights", "min ms", "median ms"], *changes]),
            "```",
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
