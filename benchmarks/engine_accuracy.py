"""Test accuracy of sparse networks in float32, bfloat16 and int8, before and after quantisation-aware fine-tuning.

    granet sweep fashion-patterns
    python benchmarks/engine_accuracy.py runs [--epochs 1] [--lr 0.01]

The first command trains GraNet with unstructured and 1x4 masks at 90 and 95 % sparsity, three seeds each. The second
one takes each finished run of these in the folder, fine-tunes its last network with rounding and fixed masks (a run in
the same folder), and compiles both networks to bfloat16 and int8. The accuracies are of the compiled network, whether
it is faster or not. It prints a table as Markdown. Both commands go on where they were stopped: what was measured is
kept in engine-accuracy.jsonl in that folder.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from granet.engine import timing
from granet.lab import sources
from granet.lab.bench.side_by_side import Settings, side_by_side
from granet.train import checkpoint
from granet.train.recipe import validate
from granet.train.run import Run, execute

BATCH = 16  # divides the batches in which test images are read, so that all of them count
COLUMNS = ("float32", "bfloat16", "int8", "tuned float32", "tuned bfloat16", "tuned int8")


def fine_tuned(run, epochs, lr):
    """The run that trains the last network of another one on, its weights and inputs rounded, its masks fixed."""
    last = checkpoint.pick(run.checkpoints, "last").path
    values = run.recipe.model_dump() | {"name": "fashion-int8", "method": {"name": "fixed"}}
    values["train"] |= {"epochs": epochs, "lr": lr, "quantise": "int8", "init": str(last)}
    return Run.for_recipe(validate(values, source=str(run.path)), run.path.parent)


def accuracies(run):
    """The test accuracy of a run's last network at each precision; compiled whatever the clock says, in all layers."""
    source = sources.read(str(run.path), batch=BATCH)
    images, precisions = len(source.trainer.splits["test"]), ("bfloat16", "int8")
    found, prepared = side_by_side(source, Settings(("granet",), precisions, seconds=0.01, images=images))
    for precision in precisions:
        report = prepared[precision].report
        kept = [row.name for row in report.layers if row.chosen != precision]
        if kept or report.precision != precision or found.images != images:
            raise RuntimeError(f"{run.path} was not measured in {precision}: {found}")
    return {row.precision: row.accuracy for row in found.rows}


def measured(folder, options):
    """The rows of all finished runs of the sweep, measured now or before."""
    file = folder / "engine-accuracy.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for path in sorted(folder.glob("fashion-granet-*")):
        run = Run.open(path)
        if run.summary is None or any(row["run"] == path.name for row in rows):
            continue
        tuned = fine_tuned(run, options.epochs, options.lr)
        execute(tuned)
        row = {"run": path.name, "pattern": run.recipe.model.pattern, "seed": run.recipe.seed}
        row |= {"sparsity": run.recipe.method.sparsity, **accuracies(run)}
        row |= {f"tuned {precision}": accuracy for precision, accuracy in accuracies(tuned).items()}
        print(row, flush=True)
        rows.append(row)
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
    return rows


def spread(numbers):
    """Mean and standard deviation, in percent."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{100 * statistics.mean(numbers):.2f} ± {100 * deviation:.2f}"


def gap(one, other):
    """The difference of two means in points, with its standard error."""
    error = math.sqrt(sum(statistics.variance(numbers) / len(numbers) for numbers in (one, other)))
    return f"{100 * (statistics.mean(one) - statistics.mean(other)):+.2f} ± {100 * error:.2f}"


def table(rows):
    """The tables: accuracies, what int8 costs, and 1x4 masks beside unstructured ones."""
    groups = {}
    for row in sorted(rows, key=lambda row: (row["sparsity"], row["pattern"] != "unstructured", row["seed"])):
        groups.setdefault((row["sparsity"], row["pattern"]), []).append(row)
    lines = [f"| sparsity, masks | {' | '.join(COLUMNS)} | n |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (sparsity, pattern), found in groups.items():
        cells = [spread([row[name] for row in found]) for name in COLUMNS]
        lines.append(f"| {sparsity:.0%}, {pattern} | {' | '.join(cells)} | {len(found)} |")
    lines += [
        "",
        "| sparsity, masks, seed | bfloat16 - float32 | int8 - float32 | tuned int8 - float32 |",
        "|---" * 4 + "|",
    ]
    for (sparsity, pattern), found in groups.items():
        for row in found:
            costs = [f"{100 * (row[name] - row['float32']):+.2f}" for name in ("bfloat16", "int8", "tuned int8")]
            lines.append(f"| {sparsity:.0%}, {pattern}, {row['seed']} | {' | '.join(costs)} |")
    for sparsity in sorted({sparsity for sparsity, _ in groups}):
        pair = [groups.get((sparsity, pattern), []) for pattern in ("1x4", "unstructured")]
        if all(len(found) > 1 for found in pair):
            gaps = [gap(*([row[name] for row in found] for found in pair)) for name in COLUMNS]
            lines += [
                "",
                f"1x4 - unstructured at {sparsity:.0%}: {', '.join(map(' '.join, zip(COLUMNS, gaps, strict=True)))}",
            ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args()
    timing.NOISE = -math.inf  # compiled networks run whether they are faster or not: their accuracy is in question
    rows = measured(options.runs, options)
    if not rows:
        parser.error(f"there is no finished run in {options.runs}: `granet sweep fashion-patterns` makes them")
    print(table(rows))


if __name__ == "__main__":
    main()
