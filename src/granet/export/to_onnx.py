"""ONNX: any batch size, float32 or int8 in QDQ form, compared in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from granet.export import staging
from granet.export.calibration import examples
from granet.export.comparison import Export, bound_of, compare
from granet.export.formats import FORMATS
from granet.export.network import Network, converting, quiet

LARGEST = 2_000_000_000  # bytes of weights: protobuf holds no more in one file


def onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    precision: str = "float32",
    inputs: Iterable[object] | None = None,
    calibration: Iterable[object] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Writes an ONNX file for any batch size and returns how it compares with the model in ONNX Runtime.

    The zeros of a sparse weight are stored like other numbers: ONNX Runtime gains nothing from them. In int8, weights
    are symmetric with a scale for each output channel, and activations have one scale and zero point (QDQ form).

    Args:
        model: the model; it is left as it is.
        example: a tensor, or a tuple of the positional arguments.
        path: the file; its name ends with `.onnx`.
        precision: `"float32"` or `"int8"`.
        inputs: batches to compare on: tensors, or tuples of the arguments and perhaps labels, which give the accuracy.
            The example, and its first entry alone, if not given.
        calibration: batches like these from which int8 takes the ranges of activations.
        tolerance: the largest deviation allowed, as a share of the largest output: 1e-4 in float32, 0.25 in int8 if not
            given.

    Raises:
        ModuleNotFoundError: a package of the extra `granet[export]` is missing.
        ExportError: the model cannot be exported, or the file deviates from it by more than is allowed; no file is
            left.
        ValueError: an argument does not fit.
    """
    FORMATS["onnx"].require()
    bound = bound_of(precision, tolerance)
    path = staging.checked_path(path, FORMATS["onnx"].suffix)
    network = Network(model, example)
    data = examples(network, calibration, precision)
    weights = sum(tensor.nbytes for tensor in network.model.state_dict().values())
    if weights > LARGEST:
        raise ValueError(f"the model's weights have {weights:,} bytes, and one ONNX file holds {LARGEST:,} at most")
    with staging.staged(path) as file:
        _write(network, file)
        if data:
            _quantise(file, data)
        comparison = compare(network, _runner(file), inputs, bound)
        nbytes = staging.size(file)
    return Export(path, "onnx", precision, nbytes, bound, comparison)


def _write(network: Network, file: Path) -> None:
    import onnx

    program = network.program()
    with quiet(), converting("torch.onnx"):
        program = program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: _pooled})
        made = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    symbols = {dim.dim_param for value in made.graph.input for dim in value.type.tensor_type.shape.dim[:1]}
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = "batch"
    for node in (*made.graph.node, *(node for function in made.functions for node in function.node)):
        del node.metadata_props[:]  # they hold the paths of this machine's files
    onnx.checker.check_model(made)
    onnx.save(made, file)


def _pooled(x: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    """Returns what adaptive max pooling does, which ONNX lacks, by pooling with one window if all are equally large."""
    kernel, stride = [], []
    for n, m in zip(x.shape[-2:], size, strict=True):
        windows = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        steps = {b[0] - a[0] for a, b in pairwise(windows)} or {n}
        sizes = {end - start for start, end in windows}
        if len(steps) > 1 or len(sizes) > 1:
            raise ValueError(f"adaptive max pooling from {n} to {m} has windows of several sizes")
        kernel.append(sizes.pop())
        stride.append(steps.pop())
    return torch.ops.aten.max_pool2d_with_indices.default(x, kernel, stride)


def _quantise(file: Path, data: list[tuple[Tensor, ...]]) -> None:
    """Turns a float32 file into int8, with the ranges that activations take on `data`."""
    from onnxruntime import quantization

    prepared = file.with_name(f"prepared-{file.name}")
    names = _input_names(file)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(data)

        def get_next(self) -> dict | None:
            batch = next(self.left, None)
            return None if batch is None else {name: one.numpy() for name, one in zip(names, batch, strict=True)}

    quantization.shape_inference.quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(file),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()


def _session(file: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _input_names(file: Path) -> list[str]:
    return [value.name for value in _session(file).get_inputs()]


def _runner(file: Path):
    session = _session(file)
    names = [value.name for value in session.get_inputs()]

    def run(arguments: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: one.numpy() for name, one in zip(names, arguments, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run
