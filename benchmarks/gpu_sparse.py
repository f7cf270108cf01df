"""Sparse weights on a GPU against dense cuBLAS, both in bfloat16: 2:4 on sparse tensor cores, and blocks.

    python benchmarks/gpu_sparse.py [--repeats 15] [--out results/gpu-sparse.md]

Linear layers of transformers, `tokens` rows of input. 2:4 weights run by `torch.sparse.to_sparse_semi_structured`
(what `granet.export.semi_structured` uses), blocks of 64 x 64 as `torch.sparse_bsr` tensors (torch's Triton kernel).
Every product is checked against the dense one in float32 before it is timed. The cases run in turn, in stretches, timed
by the GPU's clock. The last column
counts the arithmetic of the dense product, beside what the card reaches on 8192^3.
"""

import argparse
import statistics
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from granet.text import columns

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)]  # outputs, inputs


def milliseconds(case, count):
    """Milliseconds a call, of `count` in a row, by the GPU's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        case()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def two_to_four(weight):
    """The weight with the two largest of every four inputs kept."""
    groups = weight.view(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    return (groups * kept).view_as(weight)


def blocks(weight, sparsity, side=64):
    """The weight with whole blocks at random places set to zero."""
    grid = torch.rand(weight.shape[0] // side, weight.shape[1] // side, device=weight.device)
    kept = grid >= grid.flatten().quantile(sparsity)
    return weight * kept.repeat_interleave(side, 0).repeat_interleave(side, 1)


def checked(name, sparse, x, weight):
    """Raises if the sparse product is not the dense one, to the rounding of bfloat16."""
    expected = F.linear(x.float(), weight.float())
    off = (F.linear(x, sparse).float() - expected).abs().max() / expected.abs().max()
    if not off < 0.01:
        raise SystemExit(f"{name}: the product is off by {off:.3f} of its largest value; nothing is timed")
    return lambda: F.linear(x, sparse)


def rows(shape, tokens, repeats, stretch):
    """Rows of the table for one layer, and reasons why a case is not in it."""
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    cases, refused = {"dense": lambda: F.linear(x, weight)}, []
    makers = {"2:4": lambda: (torch.sparse.to_sparse_semi_structured(two_to_four(weight)), two_to_four(weight))}
    for sparsity in (0.8, 0.9, 0.95):
        pruned = blocks(weight, sparsity)
        makers[f"64x64 blocks, {sparsity:.0%}"] = lambda pruned=pruned: (pruned.to_sparse_bsr((64, 64)), pruned)
    for name, make in makers.items():
        try:
            sparse, pruned = make()
            cases[name] = checked(name, sparse, x, pruned)
        except (RuntimeError, NotImplementedError) as error:  # torch has no kernel for it; a wrong result exits
            refused.append(f"{name} at {shape}, {tokens} tokens: {str(error).splitlines()[0]}")
    for case in cases.values():
        milliseconds(case, 5)
    taken = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            taken[name].append(milliseconds(case, stretch))
    base = statistics.median(taken["dense"])
    made = []
    for name, times in taken.items():
        middle = statistics.median(times)
        speed = 2 * tokens * shape[0] * shape[1] / middle / 1e9
        label = f"{shape[0]} x {shape[1]}"
        made.append(
            [label, tokens, name, f"{min(times):.3f}", f"{middle:.3f}", f"{base / middle:.2f}x", f"{speed:.0f}"]
        )
    return made, refused


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--stretch", type=int, default=20, help="products timed together")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and there is none here; granet bench --engine measures the processor")
    torch.manual_seed(0)
    square = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    milliseconds(lambda: square[0] @ square[1], 5)
    peak = 2 * 8192**3 / min(milliseconds(lambda: square[0] @ square[1], 10) for _ in range(5)) / 1e9
    table, refusals = [], []
    for tokens in (16, 512, 4096):
        for shape in SHAPES:
            made, refused = rows(shape, tokens, arguments.repeats, arguments.stretch)
            table += made
            refusals += refused
    head = ["weight", "tokens", "weights", "min ms", "median ms", "against dense", "dense TFLOP/s"]
    where = f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    text = "\n".join(
        [
            "# Sparse weights on a GPU, against dense cuBLAS in bfloat16",
            "",
            f"`python benchmarks/gpu_sparse.py`, {where}. A dense product of 8192^3 reaches {peak:.0f} TFLOP/s.",
            "",
            "```",
            columns([head, *[[str(cell) for cell in row] for row in table]]),
            "```",
            *[f"- not run: {line}" for line in refusals],
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
