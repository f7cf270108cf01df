"""What `granet bench` does: engines side by side, or a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from granet.lab import sources
from granet.lab.bench.engines import ENGINES, PRECISIONS, Prepared
from granet.lab.bench.results import SideBySide
from granet.lab.bench.side_by_side import Settings, side_by_side
from granet.lab.bench.training import StepReport, training_step


def main(
    source: str,
    *,
    training: bool = False,
    engines: Sequence[str] = (),
    precision: Sequence[str] | str = (),
    threads: int | None = None,
    streams: int = 1,
    seconds: float = 3.0,
    images: int = 500,
    cpu_time: bool = False,
    layers: bool = False,
    against: str | None = None,
    checkpoint: str | None = None,
    save_compiled: Path | None = None,
    **options,
) -> SideBySide | StepReport:
    """Returns the report to print; if a network could not be saved, its `not_saved` has the reason.

    Args:
        source: a run directory, or what else `granet.lab.sources.read` takes.
        training: measure a training step instead of inference.
        engines: names of engines, or `"all"`; those that are quick to prepare if empty.
        precision: those of the engines; all if empty.
        threads: threads of all streams together.
        streams: sessions at the same time, for the throughput.
        seconds: how long all engines take turns.
        images: test images of a run for the accuracy; 0 for none.
        cpu_time: measure processor time, for one thread on a busy machine.
        layers: measure the layers of granet's fastest compiled network, too.
        against: the pattern with which these are compared, which takes another compilation.
        checkpoint: that of a run: `"last"`, `"best"`, or None for the best if there is one, as in `granet eval`.
        save_compiled: the file to which granet's compiled network is saved, if any; in float32, or in the one precision
            that is given.
        options: those of `granet.lab.sources.read`.

    Raises:
        ValueError: an option is impossible, before anything is measured.
        ModuleNotFoundError: an engine that was asked for is not installed; the message says how to install it.
    """
    precisions = [precision] if isinstance(precision, str) else list(precision)
    if training and (precisions or engines or streams > 1 or layers or against):
        raise ValueError(
            "engines, precision, streams and layers are for inference: a training step is measured on torch and "
            "granet, in float32 and in bfloat16"
        )
    kept = precisions[0] if len(precisions) == 1 else "float32"
    if save_compiled is not None:
        _check_file(save_compiled, training=training, precisions=precisions, engines=engines)
    settings = Settings(tuple(engines), precisions or PRECISIONS, threads, streams, seconds, images, cpu_time,
                        layers or bool(against), against or "")  # fmt: skip
    for name in set(engines) & set(ENGINES):  # the user asked for it; others that are missing are left out
        if ENGINES[name].missing:
            raise ModuleNotFoundError(f"engine {name} needs {ENGINES[name].missing}")
    found = sources.read(source, checkpoint=checkpoint, **options)
    if not training:
        measured, prepared = side_by_side(found, settings)
        if save_compiled is not None:
            measured = replace(measured, not_saved=_save(measured, prepared.get(kept), kept, save_compiled))
        return measured
    if len(found.example) > 1:
        raise ValueError(f"{source} takes {len(found.example)} inputs; a training step is measured for one")
    return training_step(found.model, found.example[0])


def _save(measured: SideBySide, prepared: Prepared | None, precision: str, path: Path) -> str:
    """Saves the compiled network; returns why that was not possible, and nothing if it was.

    What was measured is printed in any case, and this after it.
    """
    why = measured.reason("granet", precision)
    if prepared is not None:
        try:
            prepared.compiled.save(path)
            return ""
        except (ValueError, OSError) as error:
            why = str(error)
    return f"nothing was saved to {path}: granet in {precision}: {why}"


def _check_file(path: Path, *, training: bool, precisions: Sequence[str], engines: Sequence[str]) -> None:
    why = ""
    if training:
        why = "training is measured, not inference"
    elif not path.absolute().parent.is_dir():
        why = "there is no such folder"
    elif len(precisions) > 1:
        why = f"a file has one precision, not {' and '.join(precisions)}"
    elif engines and not {"granet", "all"} & set(engines):
        why = "granet is not among the engines"
    if why:
        raise ValueError(f"the compiled network cannot be saved to {path}: {why}")
