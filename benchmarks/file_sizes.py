"""Sizes of ResNet-50 and VGG-19 as granet.save writes them, against dense, zip, zstd, and the limit.

    python benchmarks/file_sizes.py [--models resnet50 vgg19] [--sparsity 0.8 0.9 0.95 0.98]

Weights are as initialised, and the largest of each layer are kept, as many as ERK says. Sizes depend on the masks and
on the values, of which mainly the exponents repeat. Each file is loaded and compared with the model before its size
counts. `dense`, `zip` (deflate, level 6) and `zstd` (level 9, where the program is installed) are of a file that holds
the same numbers with their zeros, int8 with its scales. The limit is that of `granet info`. Sizes are in MB.
"""

import argparse
import datetime
import platform
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import granet
from granet.engine.precision import quantised_weight
from granet.storage.saving import opened
from granet.storage.sizes import sizes
from granet.text import markdown_table
from granet.train.models import build

DTYPES = ("float32", "bfloat16", "int8")
CLASSES = {"resnet50": 1000, "vgg19": 10}


def pruned(name, sparsity):
    """The network with the largest weights of each layer, in the proportions of ERK."""
    torch.manual_seed(0)
    model = build(name, classes=CLASSES[name], in_channels=3)
    weights = {x.name: x.parameter.detach() for x in granet.selection.select(model) if x.sparse}
    budgets = granet.distribution.erk({name: tuple(w.shape) for name, w in weights.items()}, 1 - sparsity)
    masks = {}
    for key, weight in weights.items():
        masks[key] = torch.zeros(weight.numel(), dtype=torch.bool)
        masks[key][weight.abs().flatten().topk(budgets[key]).indices] = True
    return granet.Sparsifier(
        model, granet.Fixed(), masks={key: mask.view(weights[key].shape) for key, mask in masks.items()}
    )


def with_zeros(model, dtype):
    """The tensors of a model in a dtype, zeros included, as a dense file would hold them."""
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2 or dtype == "float32":
            found[name] = tensor
        elif dtype == "bfloat16":
            found[name] = tensor.bfloat16()
        else:
            found[name], found[f"{name}:scales"] = quantised_weight(tensor)
    return found


def compressed(path):
    """The sizes of a file under zip and zstd; None without that program."""
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as file:
        file.write(path, path.name)
    if shutil.which("zstd") is None:
        return archive.stat().st_size, None
    subprocess.run(["zstd", "-q", "-f", "-9", path], check=True)
    return archive.stat().st_size, Path(f"{path}.zst").stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg19"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.98])
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}\n")
    head = ["network", "sparsity", "numbers", "granet", "dense", "zip", "zstd", "limit", "of dense", "of the limit"]
    rows = [head]
    with tempfile.TemporaryDirectory() as folder:
        small, dense = Path(folder) / "small.safetensors", Path(folder) / "dense.safetensors"
        for name in options.models:
            for sparsity in options.sparsity:
                sparsifier = pruned(name, sparsity)
                for dtype in DTYPES:
                    rows.append([name, f"{sparsity:.0%}", dtype, *row(sparsifier, dtype, small, dense)])
                    print(*rows[-1], flush=True)
    print(f"\n{markdown_table(rows, right=range(3, len(rows[0])))}")


def row(sparsifier, dtype, small, dense):
    """The sizes in MB and their ratios."""
    model = sparsifier.model
    expected = with_zeros(model, dtype)
    granet.save(sparsifier, small, dtype)
    found = granet.load(small)
    for key, tensor in found.items():
        stored = expected[key].to(tensor.dtype)
        if f"{key}:scales" in expected:
            stored = stored * expected[f"{key}:scales"].view(-1, *[1] * (stored.ndim - 1))
        assert torch.equal(tensor, stored), key
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, dense)
    with opened(small) as packed:
        limit = sum(size.limit for size in sizes(packed))
    size, whole = small.stat().st_size, dense.stat().st_size
    megabytes = ["-" if n is None else f"{n / 1e6:.2f}" for n in (size, whole, *compressed(dense), limit)]
    return [*megabytes, f"{size / whole:.1%}", f"{size / limit:.3f}"]


if __name__ == "__main__":
    main()
