"""PyTorch's own format: the program of `torch.export`, for any batch size, which runs without the model's code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from granet.export import staging
from granet.export.comparison import Export, bound_of, compare, tensors
from granet.export.formats import FORMATS
from granet.export.network import Network, quiet


def pt2(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    inputs: Iterable[object] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Writes the program of `torch.export` and returns how it compares with the model when it is loaded again.

    The file is loaded with `torch.export.load(path).module()`. AOTInductor and ExecuTorch begin with such a program.

    Args:
        model: the model; it is left as it is.
        example: a tensor, or a tuple of the positional arguments; the file does not contain it.
        path: the file; its name ends with `.pt2`.
        inputs: batches to compare on, as for `granet.export.onnx`.
        tolerance: the largest deviation allowed, as a share of the largest output; 1e-4 if not given.

    Raises:
        ExportError: the model cannot be exported, or the file deviates from it by more than is allowed; no file is
            left.
        ValueError: an argument does not fit.
    """
    bound = bound_of("float32", tolerance)
    path = staging.checked_path(path, FORMATS["pt2"].suffix)
    network = Network(model, example)
    program = network.program()
    program.example_inputs = None  # perhaps somebody's images
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # the paths of this machine's files
    with staging.staged(path) as file, quiet():
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        comparison = compare(network, lambda arguments: tensors(loaded(*arguments)), inputs, bound)
        nbytes = staging.size(file)
    return Export(path, "pt2", "float32", nbytes, bound, comparison)
