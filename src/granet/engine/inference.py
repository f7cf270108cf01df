"""Compiled inference: batch-norm folded, activations and sums fused, weights packed, the faster kernel per layer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map

from granet import native
from granet.engine import search
from granet.engine.capture import CaptureSettings, Part, capture, recording, separate
from granet.engine.graph import arguments_of, tensors_of
from granet.engine.report import InferenceReport
from granet.engine.snapshot import untouched
from granet.engine.timing import milliseconds, time_in_turns
from granet.names import described

log = logging.getLogger(__name__)

SHAPES = 8  # kinds of inputs a compiled model keeps a plan for

Signature = tuple[object, ...]


class CompiledModel(nn.Module):
    """A model compiled for inference. See `compile`.

    It holds the model itself as `model` and always computes with the weights and attributes that the model has now. The
    first call with inputs of a new shape measures and packs for that shape, which takes as long as `compile` did.

    The model itself runs, as if it were not compiled, in training mode, under autocast, for inputs that require a
    gradient, under torch.func and forward-mode differentiation, for subclasses of tensors, for inputs that overlap in
    memory, and for inputs of further shapes than were allowed. Otherwise outputs carry no gradient.
    """

    def __init__(self, model: nn.Module, *, tolerance: float, shapes: int):
        super().__init__()
        self.training = False  # and not eval(), which would reach into the model: a dropout may be on for good reason
        self.model = model
        self._settings = CaptureSettings(tolerance)
        self._shapes = shapes
        self._reports: dict[Signature, InferenceReport] = {}
        self._warned: set[str] = set()
        self._begin()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "model" and "_reports" in self.__dict__:  # another model in its place is measured anew
            self._reports = {}
            self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._captured: Callable[..., object] | None = None

    def report(self, *inputs: object, **named: object) -> InferenceReport:
        """What was measured and chosen for inputs of these shapes; without any, for the example inputs.

        Raises:
            ValueError: if the model was not compiled for such inputs.
        """
        if not inputs and not named:
            return next(iter(self._reports.values()))
        signature = signature_of(inputs, named)
        if signature not in self._reports:
            known = "; ".join(map(_words, self._reports))
            raise ValueError(f"not compiled for {_words(signature)}; it is for {known}")
        return self._reports[signature]

    @torch.compiler.disable
    def forward(self, *inputs: object, **named: object) -> object:
        """The model's output."""
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
        """Whether the model itself has to answer, whatever was compiled."""
        tensors = tensors_of([inputs, named])
        if self.model.training or _transformed() or any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return True
        if torch.is_autocast_enabled("cpu"):
            self._warn("autocast", "under autocast the model itself runs: the kernels compute in float32")
            return True
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            self._warn("gradient", "an input requires a gradient: the model itself runs, and gives it")
            return True
        if len(tensors) > 1 and _overlap(tensors):  # torch.compile does not guard this where one is changed in place
            self._warn("overlap", "inputs overlap in memory: the model itself runs; clone() of one avoids this")
            return True
        return False

    def _warn(self, kind: str, text: str, *args: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(text, *args)

    def _first_call(self, signature: Signature, inputs: tuple, named: dict) -> object:
        """The output for inputs of a new signature, which is compiled for if there are not as many as allowed."""
        with self._lock:
            if signature in self._reports:
                return self.forward(*inputs, **named)
            if len(self._reports) >= self._shapes:
                self._warn(
                    "shapes",
                    "compiled for %d shapes, called with yet another, %s: such inputs run the dense model; "
                    "compile(..., shapes=%d) allows more",
                    len(self._reports), _words(signature), 2 * self._shapes,
                )  # fmt: skip
                return self.model(*inputs, **named)
            reason = _unsupported(self.model, tensors_of([inputs, named]))
            copies = tree_map(_copy, (inputs, named))  # the model may change its inputs
            parts: list[Part] = []
            if reason is None:
                try:
                    with recording() as parts:
                        output = self._dynamo()(*inputs, **named)
                except TorchDynamoException as error:
                    said = str(error).strip().partition("\n")[0][:120]
                    reason = f"torch.compile cannot follow the model ({type(error).__name__}: {said})"
            if reason is not None:
                output = self.model(*inputs, **named)
            with untouched(self.model, *copies):
                self._reports[signature] = self._judge(parts, *copies, reason)
            return output

    def _judge(self, parts: list[Part], inputs: tuple, named: dict, reason: str | None) -> InferenceReport:
        """The report of the whole: its parts as measured, and the whole as called where that does no harm."""
        quiet = not _hooked(self.model)
        if reason is None and not parts:
            reason = "torch.compile found nothing to capture in it"
        if reason is not None:
            return _dense_report(lambda: self.model(*tree_map(_copy, inputs), **named) if quiet else None, reason)
        reports = [part.report for part in dict.fromkeys(parts)]
        rows = tuple(row for report in reports for row in report.layers)
        wins = [report for report in reports if report.chosen == "sparse"]
        whole = replace(
            reports[0],
            layers=rows,
            dense_ms=sum(part.report.dense_ms for part in parts),
            fast_ms=sum(part.report.fast_ms for part in parts),
            chosen="sparse" if wins else "dense",
            why="; ".join(dict.fromkeys(report.why for report in wins or reports)),
            error=max(report.error for report in reports),
            nbytes=sum(report.nbytes for report in wins),
            arena_nbytes=sum(report.arena_nbytes for report in wins),
        )
        if len(parts) > 1:
            whole = replace(whole, why=f"{whole.why}; captured in {len(parts)} parts, {len(wins)} of which run sparse")
        if not wins or not quiet:
            return whole
        calls = [
            lambda: self.model(*tree_map(_copy, inputs), **tree_map(_copy, named)),
            lambda: self._run(*tree_map(_copy, (inputs, named))),
        ]
        dense, fast = time_in_turns(calls, repeats=3, enough=0.3)
        if fast.is_faster_than(dense):
            return replace(whole, dense_ms=dense.least, fast_ms=fast.least)
        return replace(
            whole,
            dense_ms=dense.least,
            fast_ms=dense.least,
            chosen="dense",
            why=search.not_faster(dense, fast),
            nbytes=0,
            arena_nbytes=0,
        )

    def _run(self, inputs: tuple, named: dict) -> object:
        try:
            return self._dynamo()(*inputs, **named)
        except TorchDynamoException as error:
            self._warn("dynamo", "torch.compile cannot follow the model any more: it runs dense (%s)", error)
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

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_captured")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._begin()


_hook_lock = threading.Lock()
_hook_depth = [0, True]


@contextmanager
def _hook_guards() -> Iterator[None]:
    """Has Dynamo notice hooks that are added to modules later, which by default it does not."""
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


def _transformed() -> bool:
    """Whether torch looks for more than numbers: under torch.func, forward-mode differentiation, or export."""
    level = torch.autograd.forward_ad._current_level
    return torch._C._functorch.peek_interpreter_stack() is not None or level >= 0 or torch.compiler.is_exporting()


def signature_of(inputs: Sequence[object], named: Mapping[str, object]) -> Signature:
    """The structure of a call's arguments, with the tensors' shapes, types and devices, and the other values."""
    return _describe(tuple(inputs)), _describe(dict(named))


def _describe(value: object) -> tuple:
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return (type(value), *map(_describe, value))
    if isinstance(value, dict):
        return (dict, *((key, _describe(value[key])) for key in sorted(value, key=repr)))
    return type(value), value if isinstance(value, int | float | str | None) else None


def _words(signature: Signature) -> str:
    words: list[str] = []

    def walk(form: tuple, name: str = "") -> None:
        kind, *rest = form
        if kind is Tensor:
            words.append(name + "x".join(map(str, rest[0])))
        elif kind is dict:
            for key, item in rest:
                walk(item, f"{key}=")
        elif issubclass(kind, list | tuple):
            for item in rest:
                walk(item)
        else:
            words.append(name + (kind.__name__ if rest == [None] and kind is not type(None) else repr(rest[0])))

    for form in signature:
        walk(form)
    return ", ".join(words) or "no inputs"


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two different tensors may share an element: the ranges of addresses that they span have one in common."""
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
    tolerance: float = 1e-3,
    shapes: int = SHAPES,
) -> CompiledModel:
    """A module that computes what `model` does, faster where the model's zeros allow it.

    The model is captured by torch.compile, which follows its Python: branches, hooks, arguments of any kind and state
    that it keeps are as in the model, and code that cannot be captured runs in between. Every layer is measured on the
    example inputs with torch's dense kernels and with the sparse ones; where the whole does not come out faster than
    the dense model, or its outputs differ, the dense model is what runs, and the report says so. Outputs are compared
    on the example and on random inputs of its shape and range. Inputs of another shape are measured when they first
    come.

    The model's attributes, buffers and random state are left as they were, and so are the example inputs; hooks on the
    model run as in a call of it.

    Args:
        model: a model in eval mode with float32 parameters on the CPU.
        example_inputs: a tensor, a tuple or list of the positional arguments, or a mapping of the keyword arguments,
            of the shapes that will be run.
        tolerance: largest difference to the dense output allowed, relative to that output's largest value.
        shapes: how many kinds of inputs to compile for; any further ones run the dense model.

    Raises:
        TypeError: if something of another kind is given than is needed.
        ValueError: if the model is in training mode, or `shapes` is less than 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is {described(model)}, and a torch.nn.Module is needed")
    inputs, named = arguments_of(example_inputs)
    for name, number, kind, words in (("tolerance", tolerance, int | float, ""), ("shapes", shapes, int, " whole")):
        if isinstance(number, bool) or not isinstance(number, kind):
            raise TypeError(f"{name} is {described(number)}, and a{words} number is needed")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first, so that batch-norm can be folded")
    if shapes < 1:
        raise ValueError(f"shapes is the number of input shapes to compile for, at least 1, not {shapes}")
    fast = CompiledModel(model, tolerance=tolerance, shapes=shapes)
    inputs, named = tree_map(_copy, (inputs, named))
    with untouched(model, inputs, named), torch.no_grad():
        fast._first_call(signature_of(inputs, named), inputs, named)
    return fast


def _unsupported(model: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    if not native.available():
        return "the sparse kernels are not available on this machine"
    if isinstance(model, torch.jit.ScriptModule):
        return "a scripted model cannot be captured"
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
        spent = milliseconds(call, repeats=3)
    return InferenceReport((), spent, spent, "dense", reason, 0.0)
