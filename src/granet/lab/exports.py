"""Exports of a run's network, compared on its test images, and of named models with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from granet import files
from granet.export.comparison import Export
from granet.export.formats import FORMATS
from granet.export.staging import checked_path
from granet.lab.speed import network as read
from granet.names import unknown
from granet.shrinking.shrink import shrink as cut_out

CALIBRATION = 512  # images, spread over the training set


def main(
    source: str,
    to: str,
    *,
    output: Path | None = None,
    precision: str = "float32",
    checkpoint: str | None = None,
    images: int = 1000,
    tolerance: float | None = None,
    shrink: bool = False,
    sparsity: float = 0.9,
    distribution: str = "erk",
    size: int = 32,
) -> Export:
    """Returns the export of a run directory's network, or of a named model with random weights.

    Args:
        source: a run directory or the name of a model.
        to: the format, a name in `granet.export.FORMATS`.
        output: the file; if not given, it is called after the source and lies in the run's folder `exports`, or here.
        precision: `"float32"`, or `"int8"` calibrated on 512 training images.
        checkpoint: `"best"`, `"last"`, or None for the best if there is one.
        images: number of test images to compare on.
        tolerance: the largest deviation allowed, as a share of the largest output.
        shrink: cut dead channels out first; the note of what comes back then has the table.
        sparsity: sparsity of a named model; a run keeps its own.
        distribution: how a named model's sparsity is distributed.
        size: height and width of a named model's images.

    Raises:
        ValueError: a name or a number is not possible, or the file deviates from the model by more than is allowed.
        ModuleNotFoundError: a package of the format is missing.
    """
    if to not in FORMATS:
        raise ValueError(unknown("format", to, FORMATS))
    form = FORMATS[to]
    if precision not in form.precisions:
        raise ValueError(f"precision={precision!r} is not possible for {to}; it can be {' or '.join(form.precisions)}")
    if images < 1 or size < 1:
        raise ValueError(f"images={images}, size={size}: both must be at least 1")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1: it is the share of inactive weights")
    form.require()
    if output is not None:
        checked_path(output, form.suffix)
    options = {"sparsity": sparsity, "distribution": distribution, "size": size}
    model, shape, trainer = read(source, **options, checkpoint=checkpoint)
    if trainer is None:
        folder, name = Path(), source
        inputs = calibration = [torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))]
    else:
        folder, name = Path(source), Path(source).resolve().name
        inputs, calibration = list(trainer.images.spread("test", images)), trainer.images.spread("train", CALIBRATION)
        folder = files.subfolder(folder, "exports") if output is None else folder
    path = output or folder / f"{name}{'' if precision == 'float32' else f'-{precision}'}{form.suffix}"
    settings = {"precision": precision} if len(form.precisions) > 1 else {}
    if precision == "int8":
        settings["calibration"] = calibration
    example = inputs[0][0][:8] if trainer is not None else inputs[0]
    small = cut_out(model, example) if shrink else None
    network = small.model if small else model
    found = form.write(network, example, path, inputs=inputs, tolerance=tolerance, **settings)
    return replace(found, note="\n".join(filter(None, [found.note, str(small)]))) if small else found
