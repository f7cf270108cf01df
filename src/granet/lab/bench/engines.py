"""The engines that can run a model here: torch, torch.compile, ONNX Runtime, OpenVINO and granet.

An engine prepares a model once at a precision; each session that it then opens can run beside others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from granet import export
from granet.engine.calibration import PIECES
from granet.engine.inference import CompiledModel
from granet.engine.inference import compile as compile_sparse
from granet.engine.report import InferenceReport
from granet.engine.timing import time_in_turns
from granet.export.comparison import tensors
from granet.export.formats import FORMATS

Arguments = tuple[Tensor, ...]
Run = Callable[[Arguments], list[Tensor]]

PRECISIONS = ("float32", "bfloat16", "int8")
ANY = 1e9  # an export's own bound: outputs are compared here, for all engines alike


@dataclass(frozen=True)
class Work:
    """What all engines are given.

    Attributes:
        model: the model, in evaluation mode.
        example: its arguments.
        calibration: batches of arguments of which int8 takes the ranges.
        folder: where engines may write files.
    """

    model: nn.Module
    example: Arguments
    calibration: Sequence[Arguments]
    folder: Path


@dataclass(frozen=True)
class Prepared:
    """A model in an engine at a precision.

    Attributes:
        open: opens a session with a number of threads; it computes outputs from arguments.
        nbytes: bytes of the weights: of the packed ones, of the file, or of the tensors.
        note: what is to know about it, in words.
        compiled: the compiled model, of granet alone.
    """

    open: Callable[[int], Run]
    nbytes: int
    note: str = ""
    compiled: CompiledModel | None = None

    @property
    def report(self) -> InferenceReport | None:
        """What granet measured, None for other engines."""
        return None if self.compiled is None else self.compiled.report()


class Unable(Exception):  # noqa: N818  not an error: the engine is left out
    """The reason why an engine cannot take part."""


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        name: its name.
        precisions: those that it has.
        prepare: makes a model ready at a precision.
        packages: the optional ones that it needs.
        install: how to install them.
        usual: whether it takes part unless the user chooses.
    """

    name: str
    precisions: tuple[str, ...]
    prepare: Callable[[Work, str], Prepared] = field(repr=False)
    packages: tuple[str, ...] = ()
    install: str = ""
    usual: bool = True

    @property
    def missing(self) -> str:
        """The packages that are not installed, and how to install them; empty if none is missing."""
        absent = [package for package in self.packages if find_spec(package) is None]
        return f"{', '.join(absent)}: {self.install}" if absent else ""

    def check(self, precision: str) -> None:
        """Raises `Unable` if the engine cannot run at this precision on this machine."""
        if self.missing:
            raise Unable(f"needs {self.missing}")
        if precision == "bfloat16" and self.name != "granet" and not has_bfloat16():
            raise Unable("this processor has no bfloat16 arithmetic")


def has_bfloat16() -> bool:
    """Returns whether the processor has bfloat16 arithmetic."""
    cpu = torch.backends.cpu.get_cpu_capability().upper()
    return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile")) or (
        "SVE" in cpu
    )


def _bytes(model: nn.Module) -> int:
    return sum(one.nbytes for one in (*model.parameters(), *model.buffers()))


def _channels_last(model: nn.Module, example: Arguments) -> bool:
    """Returns whether the model is faster with its images in channels_last."""
    if example[0].dim() != 4:
        return False
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = (example[0].to(memory_format=torch.channels_last), *example[1:])
    contiguous, last = time_in_turns([lambda: model(*example), lambda: twin(*images)], repeats=3)
    return last.is_faster_than(contiguous)


def _torch(work: Work, precision: str, *, compiled: bool = False) -> Prepared:
    model, reduced = work.model, precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        last = _channels_last(model, work.example)

    def open_session(threads: int) -> Run:
        twin = copy.deepcopy(model)
        if last:
            twin = twin.to(memory_format=torch.channels_last)
        call = torch.compile(twin) if compiled else twin

        def run(arguments: Arguments) -> list[Tensor]:
            if last:
                arguments = (arguments[0].to(memory_format=torch.channels_last), *arguments[1:])
            with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                return tensors(call(*arguments))

        return run

    note = "channels_last" if last else ""
    return Prepared(open_session, _bytes(model), f"{note}, autocast".strip(", ") if reduced else note)


def _onnxruntime(work: Work, precision: str) -> Prepared:
    import onnxruntime

    path = work.folder / f"{precision}.onnx"
    calibration = {"calibration": work.calibration} if precision == "int8" else {}
    made = export.onnx(work.model, work.example, path, precision=precision, tolerance=ANY, **calibration)

    def open_session(threads: int) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def run(arguments: Arguments) -> list[Tensor]:
            feed = {name: one.numpy() for name, one in zip(names, arguments, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, feed)]

        return run

    return Prepared(open_session, made.nbytes)


def _openvino(work: Work, precision: str) -> Prepared:
    import openvino

    kept = "int8" if precision == "int8" else "float32"
    path = work.folder / f"openvino-{kept}.xml"
    if not path.exists():  # bfloat16 is the float32 file, computed in bfloat16
        calibration = {"calibration": work.calibration} if kept == "int8" else {}
        export.openvino(work.model, work.example, path, precision=kept, tolerance=ANY, **calibration)
    core = openvino.Core()
    network = core.read_model(path)
    network.reshape(dict(zip(network.inputs, [list(one.shape) for one in work.example], strict=True)))

    def open_session(threads: int) -> Run:
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        request = core.compile_model(network, "CPU", settings).create_infer_request()

        def run(arguments: Arguments) -> list[Tensor]:
            found = request.infer([one.numpy() for one in arguments], share_inputs=True)
            return [torch.from_numpy(array.copy()) for array in found.values()]

        return run

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Prepared(open_session, size, "the float32 file" if precision == "bfloat16" else "")


def _granet(work: Work, precision: str) -> Prepared:
    calibration = {"calibration": work.calibration} if precision == "int8" else {}
    first = compile_sparse(work.model, work.example, precision=precision, **calibration)
    report = first.report()
    sessions = iter([first])

    def open_session(threads: int) -> Run:
        fast = next(sessions, None) or copy.deepcopy(first)
        return lambda arguments: tensors(fast(*arguments))

    if report.chosen == "dense":
        return Prepared(open_session, _bytes(work.model), f"runs dense: {report.why}", first)
    kept = sum(row.chosen != precision for row in report.layers) if precision != "float32" else 0
    note = f"{kept} of {len(report.layers)} layers in float32" if kept else ""
    return Prepared(open_session, report.nbytes, note, first)


_EXPORT = 'pip install "granet[export]"'
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("torch", ("float32", "bfloat16"), _torch),
        Engine("torch.compile", ("float32", "bfloat16"), partial(_torch, compiled=True), usual=False),
        Engine("onnxruntime", ("float32", "int8"), _onnxruntime, FORMATS["onnx"].packages, _EXPORT),
        Engine("openvino", PRECISIONS, _openvino, FORMATS["openvino"].packages, _EXPORT),
        Engine("granet", PRECISIONS, _granet),
    )
}


def prepare(engine: Engine, precision: str, work: Work) -> Prepared:
    """Returns the model in the engine.

    Raises:
        Unable: it cannot take part; the message has the reason in one line.
    """
    engine.check(precision)
    try:
        return engine.prepare(work, precision)
    except Exception as error:  # of many kinds: each engine has its own
        reason = str(error).strip().partition("\n")[0]
        raise Unable(f"{type(error).__name__}: {reason}") from error


def calibration_of(example: Arguments, batches: Sequence[Tensor] | None) -> list[Arguments]:
    """Returns batches of arguments of the example's size; without real ones, the example itself."""
    if not batches:
        return [example]
    size = len(example[0])
    pieces = torch.cat(list(batches)).split(size)
    return [(piece,) for piece in pieces if len(piece) == size][:PIECES] or [example]
