"""Compile a sparse network for inference on the CPU, check that its outputs are the same, and measure what it gains.

    python examples/compile_and_measure.py --sparsity 0.95

The network has random weights, because only the places of its zeros matter here. Which layers run on sparse kernels is
measured on this machine; the report says, layer by layer, what was chosen and why.
"""

import argparse
import time

import torch

import granet


def milliseconds(model: torch.nn.Module, x: torch.Tensor) -> float:
    """The duration of a call in milliseconds: the smallest of twenty."""
    spent = []
    with torch.no_grad():
        for _ in range(20):
            begin = time.perf_counter()
            model(x)
            spent.append(time.perf_counter() - begin)
    return 1000 * min(spent)


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    """Compiles, compares and measures; returns dense ms, compiled ms and the largest difference of the outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.95, help="share of weights that are zero")
    parser.add_argument("--model", default="resnet20", help="one of `granet ls models`")
    parser.add_argument("--batch", type=int, default=1, help="images in a call")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = granet.train.models.build(args.model, classes=10, in_channels=3)
    granet.Sparsifier(model, granet.Static(sparsity=args.sparsity))
    model.eval()
    x = torch.randn(args.batch, 3, 32, 32)

    fast = granet.compile(model, x)
    print(fast.report())
    with torch.no_grad():
        difference = (fast(x) - model(x)).abs().max().item()
    dense_ms, fast_ms = milliseconds(model, x), milliseconds(fast, x)
    print(f"dense {dense_ms:.2f} ms, compiled {fast_ms:.2f} ms, outputs differ by at most {difference:.1e}")
    return dense_ms, fast_ms, difference


if __name__ == "__main__":
    main()
