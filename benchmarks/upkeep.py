"""What keeping ResNet-50 sparse costs beside training it: the masks of every step, and a topology update.

    python benchmarks/upkeep.py [--repeats 15] [--threads N] [--out results/upkeep.md]

Per step: clearing what must be clear, against the optimizer's own step and against a plain multiplication by float
masks. Per update: GraNet's gradual pruning and regeneration, against a plain implementation of the official procedure
(global sort for pruning, two sorts a layer for regeneration, float masks). What is compared runs in turn, many times,
and minimum and median are shown; the results are checked against each other first.
"""

import argparse
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from granet import GraNet, Sparsifier
from granet.selection import layers_of
from granet.sparsifier import masking
from granet.text import columns
from granet.topology import count
from granet.train import models


def official_update(weights, grads, masks, density, ratio):
    """The official procedure in plain torch: thresholds by full sorts, masks as floats, layer by layer."""
    pool = torch.cat([w.abs().flatten() for w in weights])
    threshold = torch.sort(pool, descending=True).values[int(pool.numel() * density)]
    masks = [(w.abs() > threshold).float() for w in weights]
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        active = int(masks[i].sum())
        n = int(ratio * active)
        if n == 0 or active == masks[i].numel():
            continue
        inactive = masks[i].numel() - active
        values = torch.sort((w * masks[i]).abs().flatten()).values
        masks[i] = ((w * masks[i]).abs() > values[inactive + n - 1]).float()
        score = g.abs() * (masks[i] == 0)
        order = torch.sort(score.flatten(), descending=True).indices
        masks[i].view(-1)[order[:n]] = 1.0
    return masks


def measure(cases, repeats, restore=lambda: None):
    """Milliseconds of each case, all in turn, `repeats` times; `restore` puts things back before each, untimed."""
    taken = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            restore()
            start = time.perf_counter()
            case()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def table(taken, base):
    rows = [["", "min ms", "median ms", f"x {base}"]]
    floor = min(taken[base])
    for name, values in taken.items():
        rows.append([name, f"{min(values):.1f}", f"{statistics.median(values):.1f}", f"{min(values) / floor:.2f}"])
    return columns(rows, right=(1, 2, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = models.build("resnet50", classes=1000, in_channels=3)
    method = GraNet(sparsity=0.9, initial_sparsity=0.5, end=100, total=200, interval=10)
    sparsifier = Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    fused = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    sparsifier.attach(optimizer, hooks=False)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    for o in (optimizer, fused):
        o.step()
    masking.clear(sparsifier._held())
    sparse = [(name, sparsifier._parameters[name]) for name in sparsifier.masks]
    floats = [sparsifier.masks[name].float() for name, _ in sparse]
    tensors = [p.detach() for _, p in sparse]
    momenta = [optimizer.state[p]["momentum_buffer"] for _, p in sparse]

    def official_masking():
        for w, m, f in zip(tensors, momenta, floats, strict=True):
            w.mul_(f)
            m.mul_(f)

    def bool_fill():
        for (name, _), w, m in zip(sparse, tensors, momenta, strict=True):
            inactive = ~sparsifier.masks[name]
            w.masked_fill_(inactive, 0)
            m.masked_fill_(inactive, 0)

    step = measure(
        {
            "SGD step": optimizer.step,
            "SGD step, fused": fused.step,
            "granet, a step (gradients)": sparsifier.mask_gradients,
            "granet, weights and momentum": lambda: masking.clear(sparsifier._held()),
            "float masks, weights and momentum": official_masking,
            "bool fill, weights and momentum": bool_fill,
        },
        args.repeats,
    )

    gradients = {name: p.grad for name, p in sparse}
    layers, names = layers_of(sparsifier._choices, gradients), [name for name, _ in sparse]
    now = 50
    for early in range(10, now, 10):  # where a run stands then
        layers = layers_of(sparsifier._choices, {name: p.grad for name, p in sparse})
        sparsifier._apply(method.update(early, layers, sparsifier.masks, sparsifier._rng))
    before, floats = sparsifier.masks, [sparsifier.masks[name].float() for name, _ in sparse]
    values = [w.clone() for w in tensors]
    density, ratio = 1 - method.sparsity_at(now), method.regeneration_at(now)
    weights, grads = [layers[n].weight for n in names], [layers[n].grad for n in names]
    ours = method.update(now, layers, before, sparsifier._rng)
    plain = official_update(weights, grads, floats, density, ratio)
    # the two differ by rounding of counts and by ties alone
    differing = sum(int((ours[n] != m.bool()).sum()) for n, m in zip(names, plain, strict=True))
    active = sum(count(mask) for mask in ours.values())
    if differing > 5e-3 * active:
        raise SystemExit(f"the two updates disagree on {differing:,} of {active:,} active weights: nothing is timed")

    def restore():
        sparsifier._set_masks(before)
        for w, value in zip(tensors, values, strict=True):
            w.copy_(value)

    def whole_update():
        sparsifier._apply(method.update(now, layers, before, sparsifier._rng))

    update = measure(
        {
            "granet, masks alone": lambda: method.update(now, layers, before, sparsifier._rng),
            "granet, applied": whole_update,
            "reading weights and gradients once": lambda: [t.abs().max() for t in (*weights, *grads)],
        },
        args.repeats,
        restore,
    )
    update |= measure(
        {"official procedure": lambda: official_update(weights, grads, floats, density, ratio)}, 3, restore
    )

    text = "\n".join(
        [
            "# Upkeep of the masks: ResNet-50, 25,502,912 sparse weights",
            "",
            f"`python benchmarks/upkeep.py --repeats {args.repeats}`, {date.today()}, {platform.machine()}, "
            f"{os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}. Masks: "
            f"{sum(mask.nbytes for mask in sparsifier.masks.values()) / sparsifier.total:.0f} byte a weight.",
            "",
            "## Every step",
            "```",
            table(step, "SGD step"),
            "```",
            f"## A topology update (step {now} of 200: to {1 - density:.1%} sparsity from "
            f"{1 - sum(map(count, before.values())) / sparsifier.total:.1%}, r = {ratio:.3f})",
            "```",
            table(update, "granet, masks alone"),
            "```",
            f"The two procedures differ in {differing:,} of {active:,} active weights (rounding of counts, ties).",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
