"""Core ML: weights as bit mask and values, read back from the package; Core ML itself runs on Apple's systems alone."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granet.export import staging
from granet.export.comparison import Export, bound_of
from granet.export.formats import FORMATS
from granet.export.network import ExportError, Network, converting, quiet

DENSE_FROM = 0.5  # the share of active weights from which a tensor is stored as it is
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def coreml(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    inputs: object = None,
    tolerance: float | None = None,
) -> Export:
    """Writes a Core ML package for one example at a time, and returns how its weights compare with the model's.

    Weights of which half or more are zero are stored as bit mask and values (coremltools' `OpThresholdPrunerConfig`),
    which Core ML reads from iOS 16 and macOS 13 on. Core ML does not run elsewhere, so the outputs are not compared:
    the package is read back, and the weight of every convolution and linear layer must be found in it, up to a factor
    for each output, because batch norms are folded into the weights before them.

    Args:
        model: the model; it is left as it is.
        example: a tensor, or a tuple of the positional arguments.
        path: the package, a folder; its name ends with `.mlpackage`.
        inputs: not used, as outputs are not compared.
        tolerance: the largest deviation of a weight allowed, as a share of the layer's largest; 1e-4 if not given.

    Raises:
        ModuleNotFoundError: coremltools is missing; the extra `granet[coreml]` brings it.
        ExportError: coremltools cannot convert the model, or a weight is not found in the package; nothing is left.
        ValueError: an argument does not fit.
    """
    FORMATS["coreml"].require()
    bound = bound_of("float32", tolerance)
    path = staging.checked_path(path, FORMATS["coreml"].suffix)
    network = Network(model, tuple(one[:1] for one in (example if isinstance(example, tuple) else (example,))))
    with staging.staged(path) as package, _hushed():
        _write(network, package)
        deviation, count = _compare(network.model, _weights(package), bound)
        nbytes = staging.size(package)
    note = (
        f"the weights of its {count} layers were read back and deviate by {deviation:.2g} of a layer's largest at most "
        f"(allowed: {bound:.2g}); the outputs were not compared, because Core ML runs on Apple's systems alone"
    )
    return Export(path, "coreml", "float32", nbytes, bound, None, note)


def _write(network: Network, package: Path) -> None:
    import coremltools
    from coremltools.optimize import coreml as optimize

    program = network.program(any_batch=False).run_decompositions({})
    options = {
        "minimum_deployment_target": coremltools.target.iOS16,
        "compute_precision": coremltools.precision.FLOAT32,
    }
    with converting("coremltools"):
        made = coremltools.convert(program, **options)
    zeros = optimize.OpThresholdPrunerConfig(
        threshold=1e-12, minimum_sparsity_percentile=1 - DENSE_FROM, weight_threshold=0
    )
    optimize.prune_weights(made, optimize.OptimizationConfig(global_config=zeros)).save(str(package))


def _weights(package: Path) -> list[Tensor]:
    """Returns the tensors of at least two dimensions in a package, dense."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program: Any = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    found = []
    for operation in program.functions["main"].operations:
        if operation.op_type == "constexpr_sparse_to_dense":
            value = operation.materialized_val_inference()
        elif operation.op_type == "const":
            value = operation.outputs[0].val
        else:
            continue
        if getattr(value, "ndim", 0) > 1:
            found.append(torch.from_numpy(value.copy()))
    return found


def _compare(model: nn.Module, found: list[Tensor], bound: float) -> tuple[float, int]:
    """Returns the largest deviation of a layer's weights from those found in the package, and the number of layers.

    Raises:
        ExportError: the weight of a layer is not among those found.
    """
    largest = 0.0
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    for name, module in layers.items():
        deviations = [_deviation(module.weight, one) for one in found if one.shape == module.weight.shape]
        best = min(deviations, default=float("inf"))
        if not best <= bound:
            raise ExportError(f"the weight of {name or 'the model'} is not in the package that coremltools wrote")
        largest = max(largest, best)
    return largest, len(layers)


def _deviation(weight: Tensor, found: Tensor) -> float:
    """Returns the largest difference of two weights, as a share of the largest, up to a factor for each output."""
    a, b = weight.flatten(1).double(), found.flatten(1).double()
    factor = (a * b).sum(1, keepdim=True) / (a * a).sum(1, keepdim=True).clamp_min(1e-300)
    return ((factor * a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


@contextlib.contextmanager
def _hushed():
    """Hides the progress bars of coremltools and what it says of versions and of Core ML's absence here."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), quiet():
        import coremltools  # noqa: F401  it speaks when it is imported

        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
