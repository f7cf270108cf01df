"""Compiled inference: batch norms are folded, activations and sums fused, and each layer runs on its fastest kernel."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map

from granet import native
from granet.engine import eager, search
from granet.engine.baselines import AS_IS, dense_calls, faster_one
from granet.engine.calibration import PIECES, calls, check_finite
from granet.engine.capture import TOLERANCES, CaptureSettings, Part, capture, recording, separate
from granet.engine.graph import arguments_of, tensors_of
from granet.engine.report import InferenceReport
from granet.engine.saved import whole
from granet.engine.signature import Signature, signature_of, signature_text
from granet.engine.snapshot import untouched
from granet.engine.timing import milliseconds, time_in_turns
from granet.names import described, unknown
from granet.sparsifier.sparse_storage import is_stored

log = logging.getLogger(__name__)

COMPILED = "compiled"
SHAPES = 8  # shapes of inputs for which a compiled model keeps programs


class CompiledModel(nn.Module):
    """A model compiled for inference. See `compile`.

    The attribute `model` is the model itself; the compiled model always computes with its current weights and
    attributes. The first call with inputs of a new shape measures and packs for that shape, which takes as long as
    `compile` did.

    The model itself runs, as if it were not compiled, in training mode, under autocast, for inputs that require a
    gradient, under torch.func and forward-mode differentiation, for subclasses of tensors, for inputs that overlap in
    memory, and for new shapes once the allowed number of shapes is reached. In all other cases the outputs carry no
    gradient.
    """

    def __init__(self, model: nn.Module, settings: CaptureSettings, *, shapes: int, calibration: object = None):
        super().__init__()
        self.training = False  # not by eval(), which changes the model too: a layer may train on purpose
        self.model = model
        self._settings = settings
        self._calibration = calibration
        self._shapes = shapes
        self._reports: dict[Signature, InferenceReport] = {}
        self._warned: set[str] = set()
        self._begin()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "model" and "_reports" in self.__dict__:  # a new model has to be measured
            self._reports = {}
            self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._captured: Callable[..., object] | None = None

    def report(self, *inputs: object, **named: object) -> InferenceReport:
        """Returns what was measured and chosen for inputs of these shapes, or without any for the example inputs.

        Raises:
            ValueError: if the model was not compiled for such inputs.
        """
        if not inputs and not named:
            return next(iter(self._reports.values()))
        signature = signature_of(inputs, named)
        if signature not in self._reports:
            compiled = "; ".join(map(signature_text, self._reports))
            raise ValueError(f"not compiled for {signature_text(signature)}, only for {compiled}")
        return self._reports[signature]

    @torch.compiler.disable
    def forward(self, *inputs: object, **named: object) -> object:
        """Returns the model's output."""
        if self._plain_call(inputs, named):
            return self.model(*inputs, **named)
        signature = signature_of(inputs, named)
        with torch.no_grad():
            report = self._reports.get(signature)
            if report is None:
                return self._first_call(signature, inputs, named)
            if report.chosen == "dense":
                return self.model(*inputs, **named)
            return self._run(inputs, named)

    def _plain_call(self, inputs: tuple, named: dict) -> bool:
        """Returns whether the model itself has to compute the output, whatever was compiled."""
        tensors = tensors_of([inputs, named])
        if self.model.training or eager.transformed() or torch.compiler.is_exporting():
            return True
        if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return True
        if torch.is_autocast_enabled("cpu"):
            self._warn("autocast", "under autocast the model itself runs, because the kernels compute in float32")
            return True
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self._warn("gradient", "an input requires a gradient, so the model itself runs")
            return True
        if len(tensors) > 1 and _overlap(tensors):  # torch.compile does not notice it if one is changed in place
            self._warn(
                "overlap",
                "inputs overlap in memory, so the model itself runs; pass a clone() of one of them to avoid this",
            )
            return True
        return False

    def _warn(self, kind: str, text: str, *args: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(text, *args)

    def _first_call(self, signature: Signature, inputs: tuple, named: dict) -> object:
        """Returns the output for inputs of a new signature, and compiles for it unless the limit is reached."""
        with self._lock:
            if signature in self._reports:
                return self.forward(*inputs, **named)
            if len(self._reports) >= self._shapes:
                self._warn(
                    "shapes",
                    "compiled for %d shapes and called with another one, %s: such inputs run the dense model; "
                    "compile(..., shapes=%d) allows more",
                    len(self._reports), signature_text(signature), 2 * self._shapes,
                )  # fmt: skip
                return self.model(*inputs, **named)
            reason = _unsupported(self.model, tensors_of([inputs, named]))
            copies = tree_map(_copy, (inputs, named))  # the model may change its inputs
            parts: list[Part] = []
            if reason is None:
                try:
                    if self._calibration is not None:
                        with untouched(self.model, *copies):
                            self._calibrate(*copies)
                    with recording() as parts:
                        output = self._dynamo()(*inputs, **named)
                except TorchDynamoException as error:
                    first_line = str(error).strip().partition("\n")[0][:120]
                    reason = f"torch.compile cannot follow the model ({type(error).__name__}: {first_line})"
            if reason is not None:
                output = self.model(*inputs, **named)
            with untouched(self.model, *copies):
                self._reports[signature] = self._judge(parts, *copies, reason)
            return output

    def _calibrate(self, inputs: tuple, named: dict) -> None:
        """Lets the parts of the model for inputs of this shape see the calibration data."""
        self._settings.calibrating = True
        try:
            for positional, keywords in calls(self._calibration, inputs, named):
                self._dynamo()(*tree_map(_copy, positional), **tree_map(_copy, keywords))
        finally:
            self._settings.calibrating = False

    def _judge(self, parts: list[Part], inputs: tuple, named: dict, reason: str | None) -> InferenceReport:
        """Returns the model's report, from those of its parts. The model is timed too, unless hooks would run."""
        quiet = not _hooked(self.model)
        if reason is None and not parts:
            reason = "torch.compile found nothing to capture in it"
        if reason is not None:
            return _dense_report(lambda: self.model(*tree_map(_copy, inputs), **named) if quiet else None, reason)
        reports = [part.report for part in dict.fromkeys(parts)]
        rows = tuple(row for report in reports for row in report.layers)
        wins = [report for report in reports if report.chosen == "sparse"]
        combined = replace(
            reports[0],
            layers=rows,
            dense_ms=sum(part.report.dense_ms for part in parts),
            fast_ms=sum(part.report.fast_ms for part in parts),
            chosen="sparse" if wins else "dense",
            why="; ".join(dict.fromkeys(report.why for report in wins or reports)),
            error=max(report.error for report in reports),
            precision=wins[0].precision if wins else "float32",
            nbytes=sum(report.nbytes for report in wins),
            arena_nbytes=sum(report.arena_nbytes for report in wins),
        )
        if len(parts) > 1:
            combined = replace(
                combined, why=f"{combined.why}; captured in {len(parts)} parts, {len(wins)} of which run sparse"
            )
        if not wins or not quiet:
            return combined
        calls = dense_calls(self.model, inputs, named, self._settings.precision)
        calls[COMPILED] = lambda: self._run(*tree_map(_copy, (inputs, named)))
        spreads = dict(zip(calls, time_in_turns(list(calls.values()), repeats=3, enough=0.3), strict=True))
        fast = spreads.pop(COMPILED)
        others = {name: spread.least for name, spread in spreads.items() if name != AS_IS}
        combined = replace(combined, dense_ms=spreads[AS_IS].least, others=others)
        ahead = faster_one(spreads, fast)
        if ahead is None:
            return replace(combined, fast_ms=fast.least)
        why = search.not_faster(spreads[ahead], fast)
        if ahead != AS_IS:
            why += f'; run "{ahead}" yourself to have that'
        return replace(
            combined,
            fast_ms=combined.dense_ms,
            chosen="dense",
            why=why,
            precision="float32",
            nbytes=0,
            arena_nbytes=0,
        )

    def _run(self, inputs: tuple, named: dict) -> object:
        try:
            return self._dynamo()(*inputs, **named)
        except TorchDynamoException as error:
            self._warn("dynamo", "torch.compile cannot follow the model any more, so it runs dense (%s)", error)
            return self.model(*inputs, **named)

    def _dynamo(self) -> Callable[..., object]:
        if self._captured is None:
            model, settings = self.model, self._settings

            def call(*inputs: object, **named: object) -> object:
                return model(*inputs, **named)

            def backend(module: fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
                return capture(module, example_inputs, settings)

            compiled = torch.compile(separate(call), backend=backend, dynamic=False)

            def guarded(*inputs: object, **named: object) -> object:
                with _hook_guards():
                    return compiled(*inputs, **named)

            self._captured = guarded
        return self._captured

    def save(self, path: str | os.PathLike) -> None:
        """Writes the compiled model to one file, with its present weights, for `granet.load_compiled`.

        The file holds a program for each shape of inputs for which the compiled model runs sparse so far. It contains
        neither code nor pickles, and replaces an earlier one as a whole.

        Raises:
            NotSavable: a ValueError that says why a file cannot hold the model: it runs dense, its Python code runs
                between the captured parts or changes its state, or it calls an operator that files do not know.
        """
        with self._lock:
            whole.save(Path(path), self.model, self._settings, self._reports, self._calibration)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_captured")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._begin()


_hook_lock = threading.Lock()
_hook_depth = [0, True]


@contextmanager
def _hook_guards() -> Iterator[None]:
    """Makes Dynamo notice hooks that are added to modules later, which it does not by default."""
    config = torch._dynamo.config
    with _hook_lock:
        if _hook_depth[0] == 0:
            _hook_depth[1] = config.skip_nnmodule_hook_guards
            config.skip_nnmodule_hook_guards = False
        _hook_depth[0] += 1
    try:
        yield
    finally:
        with _hook_lock:
            _hook_depth[0] -= 1
            if _hook_depth[0] == 0:
                config.skip_nnmodule_hook_guards = _hook_depth[1]


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Returns whether two different tensors may share an element, because the ranges of their addresses overlap."""
    spans = []
    for tensor in {id(t): t for t in tensors}.values():
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel():
            reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()))
    spans.sort()
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


def _copy(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _hooked(model: nn.Module) -> bool:
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return bool(everywhere) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def compile(
    model: nn.Module,
    example_inputs: Tensor | Sequence[object] | Mapping[str, object],
    *,
    precision: str = "float32",
    calibration: Iterable[object] | None = None,
    tolerance: float | None = None,
    shapes: int = SHAPES,
) -> CompiledModel:
    """Returns a module that computes the same as `model`, faster if the model has enough zeros.

    The model is captured by torch.compile, so branches, hooks, state and arguments of any kind work as in the model;
    code that cannot be captured runs in Python as before. Every layer is measured on the example inputs, with torch's
    dense kernels and with the sparse ones. If the result is not faster than the dense model, or computes something
    else, the dense model runs, and the report says so. Outputs are compared on the example inputs and on random inputs
    of the same shape and range. Inputs of another shape are measured at the first call with them.

    The model's attributes, buffers and random state and the example inputs stay as they are. Hooks on the model run as
    in a call of the model.

    Args:
        model: a model in eval mode with float32 parameters on the CPU.
        example_inputs: a tensor, a tuple or list of the positional arguments, or a mapping of the keyword arguments.
            They need the shapes that will be used later.
        precision: "float32", "bfloat16" or "int8". At reduced precision several input channels take part in one
            instruction, so masks in which neighbouring channels are active together (patterns 1x2 and 1x4) gain most.
            Inputs and outputs stay in float32.
        calibration: for int8, batches of typical inputs, which give the range of every activation: an iterable of
            tensors, tuples or lists as a data loader yields them, or mappings. It is read for every new input shape.
        tolerance: the largest allowed difference to the dense output. In float32 it is relative to that output's
            largest value (default 1e-3). At reduced precision it is the root mean square of the differences relative to
            that of the output, on the calibration data (default 0.03 in bfloat16, 0.1 in int8); the layers that lose
            most stay in float32 until it is met, and the report names them.
        shapes: the number of input shapes to compile for. Inputs of any further shape run the dense model.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model is in training mode, `shapes` is less than 1, the precision is unknown, or the
            calibration data is missing, has another shape or holds NaN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is {described(model)}, and a torch.nn.Module is needed")
    inputs, named = arguments_of(example_inputs)
    if precision not in TOLERANCES:
        raise ValueError(unknown("precision", precision, TOLERANCES))
    if precision == "int8" and calibration is None:
        raise ValueError('precision="int8" needs calibration data: give calibration=batches of typical inputs')
    if precision != "int8" and calibration is not None:
        raise ValueError(f'calibration is for precision="int8"; in {precision} it would have no effect')
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    numbers = (("tolerance", tolerance, int | float, "a number"), ("shapes", shapes, int, "a whole number"))
    for name, number, kind, needed in numbers:
        if isinstance(number, bool) or not isinstance(number, kind):
            raise TypeError(f"{name} is {described(number)}, and {needed} is needed")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first, so that batch-norm can be folded")
    if shapes < 1:
        raise ValueError(f"shapes, the number of input shapes to compile for, must be at least 1, not {shapes}")
    inputs, named = tree_map(_copy, (inputs, named))
    if calibration is not None:
        if not isinstance(calibration, Iterable):
            raise TypeError(f"calibration is {described(calibration)}, and an iterable of batches is needed")
        calibration = calibration if isinstance(calibration, Sequence | Tensor) else list(islice(calibration, PIECES))
        check_finite(calls(calibration, inputs, named))
    fast = CompiledModel(model, CaptureSettings(tolerance, precision), shapes=shapes, calibration=calibration)
    with untouched(model, inputs, named), torch.no_grad():
        fast._first_call(signature_of(inputs, named), inputs, named)
    return fast


def _unsupported(model: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    if not native.available():
        return "the sparse kernels are not available on this machine"
    if isinstance(model, torch.jit.ScriptModule):
        return "a scripted model cannot be captured"
    if is_stored(model):
        return "its layers are in sparse storage: call fold() of the sparsifier first"
    for tensor in (*model.parameters(), *inputs):
        if tensor.device.type != "cpu":
            return f"the kernels run on the CPU, not on {tensor.device.type}"
        if tensor.is_quantized:
            return "the kernels compute in float32, not with quantised tensors"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"the kernels compute in float32, not in {str(tensor.dtype).removeprefix('torch.')}"
        if type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            return f"the kernels take plain tensors, not {type(tensor).__name__}"
    return None


def _dense_report(call: Callable[[], object], reason: str) -> InferenceReport:
    with torch.no_grad():
        dense_ms = milliseconds(call, repeats=3)
    return InferenceReport((), dense_ms, dense_ms, "dense", reason, 0.0)
