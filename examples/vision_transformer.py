"""A vision transformer of timm, trained sparsely by GraNet on handwritten digits.

    pip install "granet[timm]"
    python examples/vision_transformer.py --sparsity 0.8 --steps 200

Use `--model mixer` for an MLP-Mixer: nothing else changes, because granet finds linear and convolution layers
by their types.
"""

import argparse

import timm
import torch
from image_classifier import digits
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import granet


def network(name: str) -> nn.Module:
    """A small vision transformer or MLP-Mixer for images of one channel and 8 x 8 pixels."""
    if name == "vit":
        return VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
        )
    return MlpMixer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, num_blocks=4)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Trains, prints the plan and the result, and returns test accuracy and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["vit", "mixer"], default="vit", help="architecture")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of weights that are zero at the end")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = network(args.model)
    end, interval = max(1, args.steps * 3 // 4), max(1, args.steps // 20)
    method = granet.GraNet(sparsity=args.sparsity, initial_sparsity=0.3, end=end, total=args.steps, interval=interval)
    print(f"timm {timm.__version__}")
    print(granet.plan(model, method, skip="head"))
    sparsifier = granet.Sparsifier(model, method, skip="head")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sparsifier.attach(optimizer)
    for _ in range(args.steps):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"test accuracy {accuracy:.2%} at sparsity {sparsifier.sparsity:.2%}")
    return accuracy, sparsifier.sparsity


if __name__ == "__main__":
    main()
