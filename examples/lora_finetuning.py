"""Fine-tune a pruned transformer with LoRA, merge the adapters and keep the zeros.

    pip install "granet[peft]"
    python examples/lora_finetuning.py --sparsity 0.7 --steps 100

Merging an adapter fills the zeros of a pruned weight: the product of its two factors is dense. granet therefore takes
the masks before the adapters come and applies them again after the merge.
"""

import argparse

import peft
import text
import torch
import transformers
from torch import nn

import granet


def language_model(characters: int) -> nn.Module:
    """A small Llama with random weights, standing in for one that you have pruned and saved."""
    config = transformers.LlamaConfig(
        vocab_size=characters, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(model: nn.Module, codes: torch.Tensor, steps: int, optimizer: torch.optim.Optimizer) -> float:
    """The last loss, in nats per character, of `steps` ordinary steps."""
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        x, _ = text.batch(codes, 16, 48)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Prunes, fine-tunes with LoRA, merges; returns the sparsity before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sparsity", type=float, default=0.7, help="share of weights that the pruned model has as zeros"
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each stage")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    codes, _, characters = text.characters()

    # 1. a pruned model: trained a little, its smallest weights removed on the way
    model = language_model(characters)
    method = granet.GMP(sparsity=args.sparsity, end=max(1, args.steps // 2), interval=max(1, args.steps // 10))
    sparsifier = granet.Sparsifier(model, method, skip="lm_head")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer)
    loss = train(model, codes, args.steps, optimizer)
    print(f"pruned to {sparsifier.sparsity:.1%}: loss {loss:.3f}")
    sparsifier.detach()
    masks, before = sparsifier.masks, sparsifier.sparsity

    # 2. LoRA: the pruned weights are frozen, small dense factors are trained
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    adapters = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    print(f"LoRA on top: loss {train(adapted, codes, args.steps, adapters):.3f}")

    # 3. merge, and put the zeros back; a few more steps make up for what that costs
    merged = adapted.merge_and_unload().requires_grad_()
    again = granet.Sparsifier(merged, granet.Fixed(), masks=masks, skip="lm_head")
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    again.attach(optimizer)
    loss = train(merged, codes, args.steps, optimizer)
    print(f"merged and sparse again: loss {loss:.3f}, sparsity {again.sparsity:.1%}")
    return before, again.sparsity


if __name__ == "__main__":
    main()
