"""A small GPT on characters, sparse from the start: what the state of grown weights does to its loss.

    python benchmarks/char_gpt.py [--methods RigL GraNet] [--seeds 3] [--steps 1000] [--lr 0.01] [--out runs.json]

The text is the language reference that comes with Python (`pydoc_data.topics`, 465 kB). AdamW with torch's own
betas, two layers of width 64; all linear layers but the last are sparse, updated every 50 steps. Every run is made
twice, on the same batches: with the state that the sparsifier gives to grown weights (warm), and with that state set
back to zero after every update (zero). The loss on one fixed batch of held-out text is read before each update, right
after it and some steps later; "spike" is the mean loss of the five steps after an update less that of the five before.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional as F

import granet
from granet.sparsifier import stepping

CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 32, 16, 64, 4, 2
INTERVAL = 50
STATES = ("zero", "warm")
READ = (-1, 0, 1, 2, 3, 5, 10, 20)  # steps after an update at which the held-out loss is read
METHODS = {
    "RigL": lambda sparsity, steps: granet.RigL(sparsity=sparsity, interval=INTERVAL, end=steps * 3 // 4),
    "GraNet": lambda sparsity, steps: granet.GraNet(
        sparsity=sparsity, initial_sparsity=sparsity * 5 / 9, interval=INTERVAL, end=steps // 2, total=steps
    ),
}


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.mlp(x)


class GPT(nn.Module):
    """Characters in, a score for each next character out."""

    def __init__(self, characters):
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position.weight[: x.shape[1]])))


def text():
    """The text as numbers, in two parts, and how many characters there are."""
    whole = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    letters = sorted(set(whole))
    place = {letter: i for i, letter in enumerate(letters)}
    values = torch.tensor([place[letter] for letter in whole])
    cut = len(values) * 9 // 10
    return values[:cut], values[cut:], len(letters)


def batch(values, rng, size=BATCH):
    """`size` pieces of the text, drawn at random, with the character that follows each of theirs."""
    at = torch.randint(len(values) - CONTEXT - 1, (size, 1), generator=rng) + torch.arange(CONTEXT + 1)
    return values[at[:, :-1]], values[at[:, 1:]]


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def held_out(model, batches):
    return statistics.fmean(float(loss_of(model, *pair)) for pair in batches)


@torch.no_grad()
def forget(sparsifier, optimizer, before):
    """What the optimizer remembers of the weights that were grown since `before` is set to zero."""
    for name, p in sparsifier.model.named_parameters():
        if name in before:
            grown = sparsifier.masks[name] & ~before[name]
            for buffer in stepping.buffers([optimizer], p):
                buffer[grown] = 0


def train(method, state, seed, steps, lr, sparsity):
    """Losses of one run: of each step's batch, held-out ones around the updates, and the held-out one at the end."""
    torch.manual_seed(seed)
    train_text, test_text, characters = text()
    model = GPT(characters)
    sparsifier = granet.Sparsifier(model, METHODS[method](sparsity, steps), seed=seed, skip=["head"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    sparsifier.attach(optimizer)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    rng = torch.Generator().manual_seed(1000 + seed)
    fixed = [batch(test_text, torch.Generator().manual_seed(7), 64)]
    final = [batch(test_text, torch.Generator().manual_seed(8 + i), 64) for i in range(20)]
    losses, read, updates = [], {}, []
    for step in range(1, steps + 1):
        if sparsifier.update_due:
            read[step - 1] = held_out(model, fixed)
        loss = loss_of(model, *batch(train_text, rng))
        optimizer.zero_grad()
        loss.backward()
        before, version = dict(sparsifier.masks), sparsifier.version
        optimizer.step()
        rate.step()
        if sparsifier.version > version:
            updates.append(step)
            if state == "zero":
                forget(sparsifier, optimizer, before)
        losses.append(loss.item())
        if updates and step - updates[-1] in READ:
            read[step] = held_out(model, fixed)
    around = [[read[u + r] for r in READ] for u in updates if u + max(READ) in read]
    return {"losses": losses, "updates": updates, "around": around, "final": held_out(model, final)}


def spike(run):
    """The mean loss of the five steps after an update minus that of the five before, the mean of all updates."""
    losses = run["losses"]  # losses[u] is that of the first step after update u
    return statistics.fmean(
        statistics.fmean(losses[u : u + 5]) - statistics.fmean(losses[u - 5 : u])
        for u in run["updates"]
        if u >= 100 and u + 5 <= len(losses)
    )


def figure(rows, file):
    """The held-out loss around an update, less that right after it, as the mean of all updates and seeds."""
    import altair

    points = [
        {"method": row["method"], "state": row["state"], "step": step, "loss": loss - row["around"][READ.index(0)]}
        for row in rows
        for step, loss in zip(READ, row["around"], strict=True)
        if step >= 0
    ]
    chart = altair.Chart(altair.Data(values=points), width=280, height=200).mark_line(point=True)
    chart = chart.encode(
        x=altair.X("step:Q", title="steps after an update"),
        y=altair.Y("mean(loss):Q", title="held-out loss, less that right after it"),
        color=altair.Color("state:N", title="state of grown weights", sort=STATES),
    )
    chart.facet(altair.Facet("method:N", title=None)).save(file)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--out", type=Path, help="a JSON file of all runs; a figure of the same name is put beside it")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        for method in args.methods:
            for state in STATES:
                run = train(method, state, seed, args.steps, args.lr, args.sparsity)
                around = [statistics.fmean(column) for column in zip(*run["around"][1:], strict=True)]
                rows.append({"method": method, "state": state, "seed": seed, "final": run["final"]})
                rows[-1] |= {"spike": spike(run), "around": around}
                curve = " ".join(f"{step}: {loss:.3f}" for step, loss in zip(READ, around, strict=True))
                print(
                    f"{method} {state} {seed} final {run['final']:.4f} spike {spike(run):+.4f} at {curve}", flush=True
                )
    for method in args.methods:
        for state in STATES:
            mine = [row for row in rows if (row["method"], row["state"]) == (method, state)]
            for key in ("final", "spike") if len(mine) > 1 else ():
                values = [row[key] for row in mine]
                print(f"{method} {state} {key} {statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f}")
    if args.out:
        args.out.write_text(json.dumps(rows))
        figure(rows, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
