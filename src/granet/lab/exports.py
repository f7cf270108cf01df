"""Exports of a run's network, compared on its test images, and of other models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from granet import files
from granet.export.comparison import Export
from granet.export.formats import FORMATS
from granet.export.staging import checked_path
from granet.lab import sources
from granet.names import unknown
from granet.shrinking.shrink import shrink as cut_out

BATCH = 8  # examples that a model is recorded with; its file takes any number
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
    **options,
) -> Export:
    """Returns the export of a run directory's network, or of another model.

    Args:
        source: a run directory, or what else `granet.lab.sources.read` takes.
        to: the format, a name in `granet.export.FORMATS`.
        output: the file; if not given, it is called after the source and lies in the run's folder `exports`, or here.
        precision: `"float32"`, or `"int8"` calibrated on 512 training images.
        checkpoint: `"best"`, `"last"`, or None for the best if there is one.
        images: number of test images to compare on.
        tolerance: the largest deviation allowed, as a share of the largest output.
        shrink: cut dead channels out first; the note of what comes back then has the table.
        options: others of `granet.lab.sources.read`, such as `sparsity` and `size`.

    Raises:
        ValueError: a name or a number is not possible, or the file deviates from the model by more than is allowed.
        ModuleNotFoundError: a package of the format is missing.
    """
    if to not in FORMATS:
        raise ValueError(unknown("format", to, FORMATS))
    form = FORMATS[to]
    if precision not in form.precisions:
        raise ValueError(f"precision={precision!r} is not possible for {to}; it can be {' or '.join(form.precisions)}")
    if images < 1:
        raise ValueError(f"images={images} must be at least 1")
    sources.check(**options)
    form.require()
    if output is not None:
        checked_path(output, form.suffix)
    found = sources.read(source, checkpoint=checkpoint, batch=BATCH, **options)
    trainer = found.trainer
    if trainer is None:
        folder, name = Path(), re.sub(r"[^\w-]+", "-", Path(source).name.removesuffix(".onnx"))
        inputs = calibration = [found.example]
    else:
        folder, name = Path(source), Path(source).resolve().name
        inputs, calibration = list(trainer.images.spread("test", images)), trainer.images.spread("train", CALIBRATION)
        folder = files.subfolder(folder, "exports") if output is None else folder
    path = output or folder / f"{name}{'' if precision == 'float32' else f'-{precision}'}{form.suffix}"
    if path.resolve() == Path(source).resolve():
        raise ValueError(f"{path} would be overwritten: give another file with --output")
    settings = {"precision": precision} if len(form.precisions) > 1 else {}
    if precision == "int8":
        settings["calibration"] = calibration
    small = cut_out(found.model, found.example) if shrink else None
    network = small.model if small else found.model
    made = form.write(network, found.example, path, inputs=inputs, tolerance=tolerance, **settings)
    return replace(made, note="\n".join(filter(None, [made.note, str(small)]))) if small else made
