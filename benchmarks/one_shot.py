"""One-shot pruning of a small Llama: perplexity of magnitude, Wanda and SparseGPT, with and without OWL's budgets.

    python benchmarks/one_shot.py [--steps 1000] [--seeds 3] [--out results.json]
    python benchmarks/one_shot.py --memory

The model reads bytes and is trained on the sources of Python's own library; every twentieth file is held out. It is
made from a configuration of transformers, so nothing is downloaded. Large language models have a few features that are
far larger than the others, and a small model that was trained for minutes has none. So each model is pruned twice: as
it is (plain), and with every twelfth normalised feature made 30 times as large and the weights that read it 30 times as
small, which changes nothing in what the model computes (outliers). At the end the models pruned to 70 % are fine-tuned
by `granet.Fixed` for a tenth of the steps.

`--memory` prunes a Llama of 16 blocks of width 512 with random weights, in a process for each method, and prints how
much its resident memory grew beyond the loaded model at the most; the system has to be Linux.
"""

import argparse
import copy
import json
import math
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
import transformers

import granet
from granet.pruning.perplexity import perplexity, pieces
from granet.text import markdown_table

CONTEXT, BATCH, WIDTH, BLOCKS = 96, 16, 96, 4
METHODS = ("magnitude", "wanda", "sparsegpt")
CASES = [
    *((sparsity, None, budgets) for sparsity in (0.5, 0.6, 0.7) for budgets in ("uniform", "owl")),
    (None, "2:4", "uniform"),
    (None, "4:8", "uniform"),
]
FACTOR, EVERY = 30, 12


def texts():
    """Bytes of all modules at the top of Python's library, in two parts."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [
        b"".join(path.read_bytes() for i, path in enumerate(files) if (i % 20 == 0) == held) for held in (False, True)
    ]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts]


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": WIDTH}
    sizes |= {"intermediate_size": 3 * WIDTH, "vocab_size": 256, "max_position_embeddings": CONTEXT}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.05))


def train(model, text, steps, lr, seed, sparsifier=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    rng = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids = text[torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=rng) + torch.arange(CONTEXT)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    model.eval()


@torch.no_grad()
def with_outliers(model):
    """The same function, with some features much larger than the others."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        readers = {
            block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, layers in readers.items():
            norm.weight[::EVERY] *= FACTOR
            for layer in layers:
                layer.weight[:, ::EVERY] /= FACTOR
    return model


def measure(seed, steps, lr):
    """Rows of one trained model."""
    learn, held = texts()
    model = model_of(seed)
    start = time.perf_counter()
    train(model, learn, steps, lr, seed)
    print(f"seed {seed}: trained {steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    calibration, test = (torch.cat(pieces(text, CONTEXT, 256)).split(16) for text in (learn, held))
    dense = {"plain": model, "outliers": with_outliers(copy.deepcopy(model))}
    rows = [{"features": k, "method": "dense", "perplexity": perplexity(m, test)} for k, m in dense.items()]
    for features, whole in dense.items():
        for sparsity, pattern, budgets in CASES:
            for method in METHODS:
                pruned = copy.deepcopy(whole)
                report = granet.prune(pruned, sparsity, method, calibration, pattern=pattern, budgets=budgets)
                row = {"features": features, "method": method, "budgets": budgets, "of": pattern or f"{sparsity:.0%}"}
                row |= {"perplexity": perplexity(pruned, test)}
                row["error"] = statistics.fmean(layer.error for layer in report.layers)
                if sparsity == 0.7 and budgets == "uniform" and features == "plain":
                    sparsifier = granet.Sparsifier(pruned, granet.Fixed(), skip="lm_head")
                    train(pruned, learn, steps // 10, lr / 5, seed + 100, sparsifier)
                    assert sparsifier.active == report.active
                    row["fine-tuned"] = perplexity(pruned, test)
                rows.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def table(rows):
    """Perplexities as a table in Markdown, mean and standard deviation of all seeds."""

    def mean(key="perplexity", **wanted):
        values = [row[key] for row in rows if all(row.get(k) == v for k, v in wanted.items()) and key in row]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}" if values else ""

    lines = [["features", "sparsity", "budgets", *METHODS]]
    for features in ("plain", "outliers"):
        lines.append([features, "0%", "", *[mean(features=features, method="dense")] * 3])
        for sparsity, pattern, budgets in CASES:
            of = pattern or f"{sparsity:.0%}"
            found = [mean(features=features, of=of, budgets=budgets, method=method) for method in METHODS]
            lines.append([features, of, budgets, *found])
    tuned = [mean("fine-tuned", features="plain", of="70%", method=method) for method in METHODS]
    lines.append(["plain", "70%", "uniform, fine-tuned", *tuned])
    return markdown_table(lines, right=(1, 3, 4, 5))


def memory(method):
    """Prints what pruning takes beyond the model, in MiB."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    sizes = {"num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512}
    config = transformers.LlamaConfig(**sizes, intermediate_size=1536, vocab_size=256, max_position_embeddings=256)
    model = transformers.LlamaForCausalLM(config)
    whole = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    one = [module.weight for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    moments = sum(weight.shape[1] ** 2 for weight in one) * 4 / 2**20
    calibration = [torch.randint(256, (1, 256)) for _ in range(32)]
    with torch.no_grad():
        model(calibration[0])  # what a forward pass takes has been taken
    activations = len(calibration) * 256 * 512 * 4 / 2**20
    before = peak()
    granet.prune(model, 0.5, method, calibration)
    print(
        f"{method}: model {whole:.0f} MiB; second moments of one block {moments:.0f}, of all {16 * moments:.0f}; "
        f"activations in front of a block {activations:.0f}; peak grew by {peak() - before:.0f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    parser.add_argument("--memory", nargs="?", const="all", choices=[*METHODS, "all"])
    args = parser.parse_args()
    if args.memory == "all":
        for method in METHODS:
            subprocess.run([sys.executable, __file__, "--memory", method], check=True)
        return
    if args.memory:
        return memory(args.memory)
    rows = [row for seed in range(args.seeds) for row in measure(seed, args.steps, args.lr)]
    if args.out:
        args.out.write_text(json.dumps(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
