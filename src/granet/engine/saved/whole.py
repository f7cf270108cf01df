"""What of a compiled model a file can hold: programs captured as a whole, with no Python code between them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map

import granet
from granet import files
from granet.engine.calibration import calls
from granet.engine.capture import CaptureSettings, Part, capture, separate
from granet.engine.report import InferenceReport
from granet.engine.saved import archive, forms, model, programs, records
from granet.engine.search import difference
from granet.engine.signature import Signature, signature_text
from granet.engine.snapshot import untouched

log = logging.getLogger(__name__)


class NotSavable(ValueError):  # noqa: N818 - it describes the model
    """A compiled model, or a part of it, that a file cannot hold. The message says why."""


class _Kept(Part):
    """A part that keeps the arguments and results of its last call."""

    arguments: tuple[object, ...] = ()
    results: tuple[object, ...] = ()

    def __call__(self, args: list[object]) -> object:
        self.arguments = tuple(args)
        found = super().__call__(args)
        self.results = tuple(found) if isinstance(found, list | tuple) else (found,)
        return found

    def packed(self) -> fx.GraphModule:
        """Returns the packed graph. Raises NotSavable if it is not packed."""
        if self.report.chosen != "sparse" or self._packed is None:
            raise NotSavable(f"the dense model runs, because {self.report.why}")
        return self._packed[1]


def save(
    path: Path,
    compiled: nn.Module,
    settings: CaptureSettings,
    reports: Mapping[Signature, InferenceReport],
    calibration: Iterable[object] | None,
) -> None:
    """Writes the programs of a compiled model to a file. See `CompiledModel.save`.

    Args:
        path: the file.
        compiled: the model itself.
        settings: how it was compiled.
        reports: what was measured, by the signature of the calls.
        calibration: the calibration data, for int8.
    """
    wanted = {signature: report for signature, report in reports.items() if report.chosen == "sparse"}
    for signature in reports.keys() - wanted.keys():
        log.warning("%s does not hold inputs %s: the dense model runs for them", path, signature_text(signature))
    if not wanted:
        why = next(iter(reports.values())).why
        raise NotSavable(f"there is nothing to save: the dense model runs ({why}). torch.export saves dense models")
    if compiled.training:
        raise NotSavable("the model is in training mode, in which it runs dense: call eval() first")
    tensors: dict[str, Tensor] = {}
    made, checks = [], []
    for signature, report in wanted.items():
        try:
            inputs, named = forms.arguments_for(signature)
            if calibration is not None:  # random numbers would be outside of the ranges
                inputs, named = tree_map(_copy, calls(calibration, inputs, named)[0])
            record, output = _program(len(made), compiled, settings, inputs, named, report, tensors)
        except (ValueError, TorchDynamoException) as error:
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise NotSavable(f"for inputs {signature_text(signature)}, the model cannot be saved: {said}") from None
        made.append(record)
        checks.append((inputs, named, output))
    header = records.Header(
        format=records.FORMAT,
        granet=granet.__version__,
        torch=torch.__version__,
        isa=model.isa(),
        threads=torch.get_num_threads(),
        programs=tuple(made),
    )
    content = archive.to_bytes(header, tensors)
    loaded = model.LoadedModel(*archive.parse(content, path), path)
    for inputs, named, output in checks:
        with torch.no_grad():
            error = difference(output, loaded(*inputs, **named))
        if error != 0:
            raise NotSavable(
                f"for inputs {_text(inputs, named)}, what would be saved computes something else than the model does "
                f"(relative difference {error:.1e}): its code does more than the captured operators"
            )
    files.replace(path, content)


def _text(inputs: tuple, named: dict) -> str:
    return ", ".join("x".join(map(str, t.shape)) for t in forms.tensors_in(inputs, named))


def _program(
    number: int,
    compiled: nn.Module,
    settings: CaptureSettings,
    inputs: tuple,
    named: dict[str, Any],
    report: InferenceReport,
    tensors: dict[str, Tensor],
) -> tuple[records.ProgramRecord, object]:
    """Returns the record of one program, whose tensors are added to `tensors`, and the output that it must compute."""
    parts: list[_Kept] = []

    def part(graph: fx.GraphModule, weights: list[str | None], settings: CaptureSettings) -> _Kept:
        parts.append(_Kept(graph, weights, settings))
        return parts[-1]

    def call(*inputs: object, **named: object) -> object:
        return compiled(*inputs, **named)

    whole = torch.compile(
        separate(call), backend=lambda m, e: capture(m, e, settings, part), dynamic=False, fullgraph=True
    )
    given = forms.tensors_in(inputs, named)
    before, versions = _attributes(compiled), [t._version for t in (*_held(compiled), *given)]
    with torch.no_grad(), untouched(compiled, inputs, named):
        whole(*inputs, **named)  # packs
        output = whole(*inputs, **named)
        changed = versions != [t._version for t in (*_held(compiled), *given)] or before != _attributes(compiled)
    if changed:
        raise ValueError("it changes its inputs, buffers or attributes when it is called, and a file has no state")
    if len(parts) != 1:
        raise ValueError(f"it was captured in {len(parts)} parts")
    kept = parts[0]
    module = kept.packed()
    numbers = {id(tensor): i for i, tensor in enumerate(given)}

    def add(name: str, tensor: Tensor) -> None:
        tensors[f"{number}.{name}"] = tensor

    arguments = []
    for value in kept.arguments:
        if not isinstance(value, Tensor):
            raise ValueError("its graph takes something besides tensors")
        arguments.append(numbers.get(id(value), value))
    nodes, results = programs.stored(module, arguments, add)
    places = {id(tensor): i for i, tensor in enumerate(kept.results)}
    extra: list[int] = []

    def result(tensor: Tensor) -> JsonValue:
        if id(tensor) in places:
            return {"result": places[id(tensor)]}
        if id(tensor) in numbers:  # an input that is returned as it is
            nodes.append(records.ArgumentNode(number=numbers[id(tensor)]))
            extra.append(len(nodes) - 1)
            return {"result": len(results) + len(extra) - 1}
        raise ValueError("an output shares its memory with another tensor, or is made outside of the captured graph")

    form = forms.encoded(output, result)
    record = records.ProgramRecord(
        inputs=forms.encoded((inputs, named), forms.described_tensor),
        nodes=tuple(nodes),
        results=(*results, *extra),
        output=form,
        report=model.with_machine(report),
    )
    return record, tree_map(_copy, output)


def _copy(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _attributes(module: nn.Module) -> list[tuple]:
    """Returns what shows whether the attributes of a model, or their contents, were exchanged."""
    return [
        (name, id(value), len(value) if isinstance(value, list | dict | set) else 0)
        for one in module.modules()
        for name, value in (*vars(one).items(), *one._buffers.items())
    ]
