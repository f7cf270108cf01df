"""OpenVINO's intermediate representation: any batch size, float32 or int8 through NNCF, compared in OpenVINO."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granet.export import staging
from granet.export.calibration import examples
from granet.export.comparison import Export, bound_of, compare
from granet.export.formats import FORMATS
from granet.export.network import Network, converting, quiet


def openvino(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    precision: str = "float32",
    inputs: Iterable[object] | None = None,
    calibration: Iterable[object] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Writes an `.xml` file and its `.bin` for any batch size, and returns how they compare with the model in OpenVINO.

    Zeros are stored like other numbers, and OpenVINO gains nothing from them. The comparison runs in float32 where the
    file is float32; on a processor with bfloat16 arithmetic OpenVINO computes in bfloat16 unless told otherwise
    (`INFERENCE_PRECISION_HINT`).

    Args:
        model: the model; it is left as it is.
        example: a tensor, or a tuple of the positional arguments.
        path: the file; its name ends with `.xml`.
        precision: `"float32"`, or `"int8"` through NNCF's post-training quantisation.
        inputs: batches to compare on, as for `granet.export.onnx`.
        calibration: batches like these from which int8 takes the ranges of activations.
        tolerance: the largest deviation allowed, as a share of the largest output: 1e-4 in float32, 0.25 in int8 if not
            given.

    Raises:
        ModuleNotFoundError: a package of the extra `granet[export]` is missing.
        ExportError: the model cannot be exported, or the file deviates from it by more than is allowed; no file is
            left.
        ValueError: an argument does not fit.
    """
    FORMATS["openvino"].require()
    bound = bound_of(precision, tolerance)
    path = staging.checked_path(path, FORMATS["openvino"].suffix)
    network = Network(model, example)
    data = examples(network, calibration, precision)
    with staging.staged(path) as file:
        made = _converted(network)
        if data:
            made = _quantised(made, data)
        _save(made, file)
        comparison = compare(network, _runner(file), inputs, bound)
        nbytes = staging.size(file.parent)
    return Export(path, "openvino", precision, nbytes, bound, comparison)


def _converted(network: Network) -> Any:
    import openvino

    with quiet(), converting("OpenVINO"):
        made = openvino.convert_model(network.program())
    shapes = [[-1, *one.shape[1:]] for one in network.example]
    made.reshape(dict(zip(made.inputs, shapes, strict=True)))
    return made


def _quantised(made: Any, data: list[tuple[Tensor, ...]]) -> Any:
    import nncf

    batches = [tuple(one.numpy() for one in batch) for batch in data]
    feeds = [batch[0] if len(batch) == 1 else dict(enumerate(batch)) for batch in batches]
    with quiet(), redirect_stdout(io.StringIO()), converting("NNCF"):  # it shows progress bars
        return nncf.quantize(made, nncf.Dataset(feeds), subset_size=len(feeds))


def _save(made: Any, file: Path) -> None:
    import openvino

    openvino.save_model(made, file, compress_to_fp16=False)


def _runner(file: Path):
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(arguments: tuple[Tensor, ...]) -> list[Tensor]:
        found = compiled([one.numpy() for one in arguments])
        return [torch.from_numpy(found[port].copy()) for port in compiled.outputs]

    return run
