"""2:4 weights on the sparse tensor cores of a GPU: a copy of the model in memory, no file."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from granet.export.comparison import compare
from granet.export.network import ExportError, Network

NEEDS = "2:4 weights gain on the sparse tensor cores of NVIDIA GPUs of compute capability 8.0 or later (Ampere)"


def semi_structured(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    dtype: torch.dtype = torch.float16,
    tolerance: float = 0.02,
) -> nn.Module:
    """Returns a copy of the model on the GPU whose linear layers with 2:4 weights run on sparse tensor cores.

    A layer is converted by `torch.sparse.to_sparse_semi_structured` if at most two of every four consecutive inputs of
    each output have a weight, as masks of `pattern="2:4"` do, and if the GPU takes its shape. The copy is compared with
    the model in float32 on the example. It is for inference.

    Args:
        model: the model; it is left as it is.
        example: a tensor, or a tuple of the positional arguments.
        dtype: `torch.float16` or `torch.bfloat16`.
        tolerance: the largest deviation allowed, as a share of the largest output.

    Raises:
        ValueError: there is no such GPU, no linear layer has 2:4 weights, or the GPU takes the shape of none.
        ExportError: the outputs deviate by more than `tolerance`.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not possible; torch.float16 and torch.bfloat16 are")
    network = Network(model, example)
    names = [name for name, module in network.model.named_modules() if obeys(module)]
    if not names:
        raise ValueError('no linear layer has 2:4 weights: train with pattern="2:4"')
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(f"{NEEDS}, and this machine has none; {len(names)} layers of the model have such weights")
    made = copy.deepcopy(network.model).to("cuda", dtype)
    refused = {}
    for name in names:
        module = made.get_submodule(name)
        try:
            sparse = torch.sparse.to_sparse_semi_structured(module.get_parameter("weight").detach())
        except RuntimeError as error:  # a shape that its kernels do not take
            refused[name] = str(error)
            continue
        module.weight = nn.Parameter(sparse, requires_grad=False)
    if len(refused) == len(names):
        raise ValueError(
            f"the GPU takes none of the {len(names)} layers with 2:4 weights: {next(iter(refused.values()))}"
        )

    def run(arguments: tuple[Tensor, ...]) -> list[Tensor]:
        moved = [one.to("cuda", dtype if one.is_floating_point() else None) for one in arguments]
        outputs = made(*moved)
        if not isinstance(outputs, Tensor):
            raise ExportError("the model returns something that is no tensor: its outputs cannot be compared")
        return [outputs.float().cpu()]

    with torch.no_grad():
        compare(network, run, [network.example], tolerance)
    return made


def obeys(module: nn.Module) -> bool:
    """Returns whether it is a linear layer with at most two weights in every four consecutive inputs."""
    if not isinstance(module, nn.Linear) or module.in_features % 4:
        return False
    return bool(((module.weight != 0).reshape(-1, 4).sum(dim=1) <= 2).all())
