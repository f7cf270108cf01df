"""A character-level GPT, trained sparsely from the first step with AdamW and RigL.

    python examples/character_gpt.py --sparsity 0.8 --steps 500

It learns to write Python from the source of Python's standard library. Token embeddings and the output layer stay
dense; the attention and feed-forward weights are sparse.
"""

import argparse

import text
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import granet


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each with a residual connection around it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT; returns the logits of the next character at every position, of shape (n, length, characters)."""

    def __init__(self, characters: int, length: int, width: int = 64, heads: int = 4, depth: int = 2):
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.position(places))))


def main(arguments: list[str] | None = None) -> float:
    """Trains the GPT, prints losses and returns the validation loss in nats per character."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of the sparse weights that are zero")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--length", type=int, default=64, help="characters that the network looks back on")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    training, validation, characters = text.characters()
    model = GPT(characters, args.length)
    method = granet.RigL(sparsity=args.sparsity, end=max(1, args.steps * 3 // 4), interval=max(1, args.steps // 20))
    sparsifier = granet.Sparsifier(model, method, skip="head")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer)

    for step in range(1, args.steps + 1):
        x, y = text.batch(training, 32, args.length)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        sparsifier.clip_grad_norm_(1.0)  # counts the gradients of active weights only
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step:>5}  loss {loss.item():.3f}  sparsity {sparsifier.sparsity:.1%}")

    with torch.no_grad():
        x, y = text.batch(validation, 64, args.length)
        final = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    print(f"validation loss {final:.3f} nats per character with {sparsifier.active:,} of {sparsifier.total:,} weights")
    return final


if __name__ == "__main__":
    main()
