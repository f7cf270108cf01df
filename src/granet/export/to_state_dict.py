"""The plain state dict: dense tensors in safetensors, under the model's own names, for any copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from granet.export import staging
from granet.export.comparison import Export, bound_of, compare, tensors
from granet.export.formats import FORMATS
from granet.export.network import Network


def state_dict(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    inputs: Iterable[object] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Writes the dense state dict and returns how a copy of the model that loads it compares with the model.

    The file is loaded with `model.load_state_dict(safetensors.torch.load_file(path))`. A tensor that has several names
    is stored under each of them.

    Args:
        model: the model; it is left as it is.
        example: a tensor, or a tuple of the positional arguments.
        path: the file; its name ends with `.safetensors`.
        inputs: batches to compare on, as for `granet.export.onnx`.
        tolerance: the largest deviation allowed, as a share of the largest output; 1e-4 if not given.

    Raises:
        ExportError: the file deviates from the model by more than is allowed; no file is left.
        ValueError: an argument does not fit, or the state dict holds something that is no tensor.
    """
    from safetensors.torch import load_file, save_file

    bound = bound_of("float32", tolerance)
    path = staging.checked_path(path, FORMATS["state-dict"].suffix)
    network = Network(model, example)
    state = network.model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"the state dict holds {', '.join(others)}, which are no tensors: safetensors stores these alone"
        )
    twin = copy.deepcopy(network.model)
    for tensor in twin.state_dict().values():
        tensor.zero_()  # so that nothing but the file can give its outputs
    with staging.staged(path) as file:
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, file)
        twin.load_state_dict(load_file(file))
        comparison = compare(network, lambda arguments: tensors(twin(*arguments)), inputs, bound)
        nbytes = staging.size(file)
    return Export(path, "state-dict", "float32", nbytes, bound, comparison)
