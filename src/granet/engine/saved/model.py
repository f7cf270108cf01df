"""Compiled models loaded from files: they run without the model's Python code, and without torch.compile."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from granet import native
from granet.engine import eager, ops
from granet.engine.report import InferenceReport
from granet.engine.saved import archive, forms
from granet.engine.saved.archive import CompiledFileError
from granet.engine.saved.programs import StoredProgram
from granet.engine.saved.records import Header, ProgramRecord
from granet.engine.signature import Signature, signature_of, signature_text

log = logging.getLogger(__name__)


class LoadedModel:
    """A compiled model from a file. Call it as the model was called. See `load_compiled`.

    It has no parameters, no training mode and no gradients: outputs never carry a gradient. Under autocast it computes
    the same as without. Several threads may call it at the same time.
    """

    def __init__(self, header: Header, tensors: dict[str, Tensor], path: Path):
        self.path = path
        self._programs: dict[Signature, tuple[StoredProgram, ProgramRecord]] = {}
        for number, record in enumerate(header.programs):
            try:
                inputs, named = forms.arguments(record.inputs)
                arguments = len(forms.tensors_in(inputs, named))
                own = {n.removeprefix(f"{number}."): t for n, t in tensors.items() if n.startswith(f"{number}.")}
                program = StoredProgram(record.nodes, record.results, arguments, own)
                _output(record, [None] * len(record.results))
            except (ValueError, RuntimeError, TypeError, RecursionError) as error:
                raise CompiledFileError(f"{path}: program {number}: {' '.join(str(error).split()):.400}") from None
            self._programs[signature_of(inputs, named)] = program, record

    def __call__(self, *inputs: object, **named: object) -> object:
        """Returns the model's output.

        Raises:
            ValueError: if the file has no program for such inputs, or they require gradients.
        """
        program, record = self._found(signature_of(inputs, named))
        tensors = forms.tensors_in(inputs, named)
        if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
            raise ValueError("a loaded compiled model takes plain tensors")
        if eager.transformed():
            raise ValueError("a loaded compiled model has no derivatives: it cannot be called under torch.func")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError(
                "an input requires a gradient, and a loaded compiled model has none: call it under torch.no_grad(), "
                "or pass x.detach()"
            )
        autocast = torch.is_autocast_enabled("cpu")
        off = torch.autocast("cpu", enabled=False) if autocast else contextlib.nullcontext()
        with torch.no_grad(), off:
            return _output(record, program(tensors))

    def _found(self, signature: Signature) -> tuple[StoredProgram, ProgramRecord]:
        found = self._programs.get(signature)
        if found is None:
            saved = "; ".join(map(signature_text, self._programs))
            raise ValueError(
                f"{self.path} was saved for inputs {saved}, not for {signature_text(signature)}: call the compiled "
                "model with such inputs before it is saved"
            )
        return found

    def report(self, *inputs: object, **named: object) -> InferenceReport:
        """Returns what was measured when the model was compiled, for inputs of these shapes, or for the first ones.

        Raises:
            ValueError: if the file has no program for such inputs.
        """
        if not inputs and not named:
            return next(iter(self._programs.values()))[1].report
        return self._found(signature_of(inputs, named))[1].report

    @property
    def nbytes(self) -> int:
        """The bytes of packed weights and index structures, for all shapes."""
        return sum(runner.program.nbytes for program, _ in self._programs.values() for runner in program.runners)

    def __repr__(self) -> str:
        return f"LoadedModel({str(self.path)!r}, inputs {'; '.join(map(signature_text, self._programs))})"


def _output(record: ProgramRecord, results: list[object]) -> object:
    def result(form: dict) -> object:
        number = form.get("result")
        if type(number) is not int or not 0 <= number < len(results):
            raise ValueError(f"its output has no result {number!r:.40}, of {len(results)}")
        return results[number]

    return forms.decoded(record.output, result)


def load_compiled(path: str | os.PathLike) -> LoadedModel:
    """Returns a compiled model that `CompiledModel.save` wrote, as a callable that computes the same.

    The model's own code is not needed. Nothing is measured, packed or captured, so it takes a fraction of a second and
    about as much memory as the packed weights. The file may come from anybody: it is checked as a whole before
    anything runs, and nothing in it is executed but a closed list of operators. On the processor on which it was saved,
    results are equal to the bit; on one with other instructions the same weights run on the kernels that it has.

    Raises:
        FileNotFoundError: if there is no such file.
        CompiledFileError: a ValueError: the file is damaged, of another version, or no compiled model.
        EngineUnavailable: the kernels are not available on this machine, see `granet.native`.
    """
    path = Path(path)
    header, tensors = archive.read(path)
    ops.prepare()
    model = LoadedModel(header, tensors, path)
    names, here = list(native.WIDTHS), isa()
    if header.isa in names and names.index(here) < names.index(header.isa):
        log.warning(
            "%s was measured with %s, and this processor runs %s: results are right, but slower", path, header.isa, here
        )
    return model


def isa() -> str:
    """Returns the instruction set of the kernels that run here."""
    ops.prepare()
    return native.REDUCED[torch.ops.granet.reduced_cpu()[0]]


def with_machine(report: InferenceReport) -> InferenceReport:
    """Returns a report that says on which machine it was measured: this one."""
    name = _processor()
    return replace(report, machine=f"{name} ({isa()}, {torch.get_num_threads()} threads)")


def _processor() -> str:
    import platform

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
