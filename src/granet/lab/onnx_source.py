"""An ONNX file as a model of torch, by onnx2torch; what cannot be read is refused."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from granet.export.network import quiet

OPERATORS = 16  # the newest version of ONNX's operators that onnx2torch 1.5 knows
SIZE = 224  # height and width of images that the file leaves open


def read(path: str, batch: int | None, size: int | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns the model in an ONNX file and random inputs. Where ONNX Runtime is installed, outputs are compared.

    Raises:
        ValueError: the file is damaged, has an operator that onnx2torch does not know, or inputs of unknown shape; or
            the model computes something else than the file.
    """
    import onnx

    try:
        with quiet():
            file = onnx.load(path)
    except Exception as error:  # of protobuf, or of a file of weights that is missing
        raise ValueError(f"{path} is no ONNX file that can be read: {_first_line(error)}") from error
    stored = {one.name for one in file.graph.initializer}
    example = tuple(_input(path, one, batch, size) for one in file.graph.input if one.name not in stored)
    if not example:
        raise ValueError(f"{path} takes no inputs")
    model = _converted(path, file)
    if find_spec("onnxruntime") is not None:
        _compare(path, model, example)
    return model, example


def _converted(path: str, file: Any) -> nn.Module:
    """Returns the model, if need be by way of the older set of operators that onnx2torch knows."""
    import onnx
    import onnx2torch

    try:
        with quiet():
            if max(one.version for one in file.opset_import if not one.domain) > OPERATORS:
                file = onnx.version_converter.convert_version(file, OPERATORS)
            _simplify(file)
            return onnx2torch.convert(file).eval()
    except Exception as error:  # NotImplementedError for unknown operators, and others
        raise ValueError(f"onnx2torch cannot turn {path} into a model: {_first_line(error)}") from error


def _simplify(file: Any) -> None:
    """Takes `allowzero` from reshapes to sizes without a zero: it says nothing there, and onnx2torch refuses it."""
    import onnx

    sizes = {one.name: onnx.numpy_helper.to_array(one) for one in file.graph.initializer if one.dims}
    for node in file.graph.node:
        if node.op_type == "Reshape" and node.input[1] in sizes and sizes[node.input[1]].all():
            kept = [one for one in node.attribute if one.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _input(path: str, value: Any, batch: int | None, size: int | None) -> Tensor:
    import onnx

    kind = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    if not sizes:
        raise ValueError(f"{path}: the file does not tell the shape of its input {value.name!r}")
    batch = batch or sizes[0] or 1
    if sizes[0] not in (None, batch):
        raise ValueError(f"{path} takes batches of {sizes[0]} alone: give --batch {sizes[0]}")
    open_sides = [i for i, one in enumerate(sizes) if i and one is None]
    if open_sides and not (len(sizes) == 4 and min(open_sides) > 1):
        raise ValueError(f"{path}: the file leaves axis {open_sides[0]} of its input {value.name!r} open")
    shape = [batch, *(one or size or SIZE for one in sizes[1:])]
    types = onnx.TensorProto
    if kind.elem_type == types.FLOAT:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = {types.INT32: torch.int32, types.INT64: torch.int64}
    if kind.elem_type in whole:
        return torch.zeros(shape, dtype=whole[kind.elem_type])
    raise ValueError(
        f"{path}: its input {value.name!r} is of type {types.DataType.Name(kind.elem_type)}; inputs in FLOAT, INT32 "
        "and INT64 can be made"
    )


def _compare(path: str, model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Refuses a model that does not compute what ONNX Runtime computes with the file."""
    import onnxruntime
    from torch.utils._pytree import tree_leaves

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    expected = session.run(None, {name: one.numpy() for name, one in zip(names, example, strict=True)})
    try:
        with torch.no_grad():
            found = tree_leaves(model(*example))
    except Exception as error:  # of many kinds
        raise ValueError(f"the model that onnx2torch makes of {path} fails: {_first_line(error)}") from error
    for a, b in zip((torch.from_numpy(one) for one in expected), found, strict=True):
        gap = (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("inf")
        if not gap <= 1e-3 * max(a.double().abs().max().item(), 1e-12):
            raise ValueError(f"the model that onnx2torch makes of {path} computes something else than ONNX Runtime")
