"""Capture by `torch.compile`: graphs of aten operators become parts that run on the kernels where that is faster.

Dynamo follows the model's Python code and guards everything it relied on. AOTAutograd makes mutations and aliases
explicit. The graphs that arrive here are pure functions of their arguments, which include parameters and buffers.
"""

from __future__ import annotations

import logging
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._dynamo import register_backend
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.utils._pytree import tree_map

from granet import native
from granet.engine.graph import Stages, lower
from granet.engine.quantise import Ranges
from granet.engine.reduction import choose_reduction
from granet.engine.report import InferenceReport
from granet.engine.runtime import build
from granet.engine.search import Decision, compare, search
from granet.engine.timing import milliseconds
from granet.engine.weights import Constants, WeightCheck

log = logging.getLogger(__name__)

TOLERANCES = {"float32": 1e-3, "bfloat16": 3e-2, "int8": 1e-1}
TOLERANCE = TOLERANCES["float32"]
CASES = 4  # calibration calls on which results are compared
_calls = threading.local()


@dataclass
class CaptureSettings:
    """Settings and results that the parts of one compiled model share.

    Attributes:
        tolerance: the largest difference of outputs allowed, relative to the largest value.
        precision: "float32", "bfloat16" or "int8".
        calibrating: whether calls only collect the ranges of values and run dense.
        decisions: how each graph is computed, by the graph's text. A graph that was seen before is packed without
            measuring it again.
    """

    tolerance: float = TOLERANCE
    precision: str = "float32"
    calibrating: bool = False
    decisions: dict[str, Decision] = field(default_factory=dict)


class Part:
    """One captured graph, which is measured and packed at its first call.

    Args:
        module: the graph of aten operators.
        weights: for each argument, the name of its parameter or buffer, or None if it is neither.
        settings: the settings that all parts of the model share.
    """

    _boxed_call = True  # AOTAutograd passes the arguments in a list, which is to be emptied here

    def __init__(self, module: fx.GraphModule, weights: Sequence[str | None], settings: CaptureSettings):
        self.module, self.settings = module, settings
        holders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._weights = {n: i for i, (n, w) in enumerate(zip(holders, weights, strict=True)) if w is not None}
        self._names = {n: weights[i] for n, i in self._weights.items()}
        self._packed: tuple[WeightCheck, fx.GraphModule] | None = None
        self._places: set[int] = set()  # positions of the arguments that are packed
        self._stale: WeightCheck | None = None  # the weights that were new at the last call
        self._ranges: Ranges | None = None
        self._calibration: list[tuple[object, ...]] = []  # the first lists of arguments
        self.decision: Decision | None = None
        self._lock = threading.Lock()

    @property
    def report(self) -> InferenceReport:
        """The report of what was measured."""
        return self.decision.report

    def __call__(self, args: list[object]) -> object:
        """Returns the graph's outputs."""
        arguments = tuple(args)
        args.clear()
        if self.settings.calibrating:
            return self._calibrate(arguments)
        if self.decision is None:
            with self._lock:
                if self.decision is None:
                    self._prepare(arguments)
        recorded = getattr(_calls, "parts", None)
        if recorded is not None:
            recorded.append(self)
        run = self._current(arguments) if self.report.chosen == "sparse" else self.module
        with torch.no_grad():
            return run(*arguments)

    def _current(self, args: tuple[object, ...]) -> Callable[..., object]:
        """Returns the packed graph if its weights are those of this call, else the graph on torch's kernels.

        New weights are packed when a second call comes with them, so that weights that change at every call are never
        packed.
        """
        packed = self._packed
        if packed is not None and packed[0].same(args):
            return packed[1]
        with self._lock:
            if self._packed is not packed:
                return self.module
            stale = self._stale
            if stale is not None and stale.same(args):
                self._pack(args)
            elif packed is not None or stale is not None:
                self._stale = WeightCheck(args, self._places)
                self._packed = None
            return self.module

    def _prepare(self, args: tuple[object, ...]) -> None:
        key = self._key()
        self.decision = self.settings.decisions.get(key)
        if self.decision is None:
            try:
                with torch.no_grad(), _on_cpu():
                    self.decision = self._measure(args)
            except Exception as error:  # the graph then runs unchanged, and the report gives the reason
                log.warning("a part of the model is not compiled", exc_info=True)
                said = str(error).partition("\n")[0][:120]
                self.decision = self._dense(args, f"it could not be compiled ({type(error).__name__}: {said})")
            self.settings.decisions[key] = self.decision
        elif self.report.chosen == "sparse":
            self._pack(args)
        self._ranges, self._calibration = None, []  # the decision holds what is needed of them

    def _key(self) -> str:
        holders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        shapes = [str(getattr(node.meta.get("val"), "shape", None)) for node in holders]
        return f"{self.module.code}\n{shapes}\n{list(self._names.values())}\n{torch.get_num_threads()} threads"

    def _measure(self, args: tuple[object, ...]) -> Decision:
        if not native.available():
            return self._dense(args, "the sparse kernels are not available on this machine")
        stages, constants = self.stages(args)
        if not any(segment.layers for segment in stages.segments):
            return self._dense(args, "it has no layer that the kernels compute")
        precision, tolerance, reduction = self.settings.precision, self.settings.tolerance, None
        if precision == "float32":
            inputs = set(range(len(args))) - set(self._weights.values())
            cases = [args, tuple(_random_like(a) if i in inputs else a for i, a in enumerate(args))]
        elif precision == "int8" and self._ranges is None:
            return self._dense(args, "it was not calibrated for inputs of this shape")
        else:
            cases = [args, *self._calibration]
            reduction, error = choose_reduction(stages, self.module, cases, precision, tolerance, self._ranges)
            if not error <= tolerance:
                return self._dense(args, f"in {precision} the outputs differ by {error:.1e}, beyond {tolerance:.1e}")
        decision, fast = search(stages, self.module, cases, tolerance, self._names, reduction)
        if fast is not None:
            self._keep(args, constants, fast)
        return decision

    def _calibrate(self, args: tuple[object, ...]) -> object:
        """Returns the graph's outputs, having seen what its values are."""
        with self._lock, torch.no_grad():
            if self._ranges is None:
                self._ranges = Ranges(self.module, self.stages(args)[0].nodes.values())
            if len(self._calibration) < CASES:
                self._calibration.append(tree_map(_copy, args))
            return self._ranges.see(args)

    def _keep(self, args: tuple[object, ...], constants: Constants, fast: fx.GraphModule) -> None:
        self._places = constants.used
        self._packed = WeightCheck(args, self._places), fast

    def stages(self, args: tuple[object, ...]) -> tuple[Stages, Constants]:
        """Returns the graph lowered for the weights among these arguments, and the constants it was lowered with."""
        constants = Constants(self._weights, args)
        with torch.no_grad():
            return lower(self.module.graph, constants, self._names), constants

    def _dense(self, args: tuple[object, ...], why: str) -> Decision:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            spent = milliseconds(lambda: self.module(*args), repeats=3)
        return Decision((), InferenceReport((), spent, spent, "dense", why, 0.0))

    def _pack(self, args: tuple[object, ...]) -> None:
        """Packs the weights of this call as decided before; if that fails, torch's kernels compute from now on."""
        self._stale = None
        try:
            with torch.no_grad(), _on_cpu():
                stages, constants = self.stages(args)
                stages = self.decision.reduced(stages)
                fast = build(stages, self.decision.programs(stages))
                error = compare(self.module, fast, args, self.decision.reduction)
            if not error <= self.settings.tolerance:
                raise ValueError(f"the outputs differ by {error:.1e}")
            self._keep(args, constants, fast)
        except Exception as error:  # as in _prepare
            log.warning("weights that have changed were not packed: the dense model runs", exc_info=True)
            self.decision = self._dense(args, f"changed weights could not be packed ({error})")


def _on_cpu() -> AbstractContextManager:
    """Returns a context in which tensors are made on the CPU, whatever device `torch.set_default_device` was given.

    Where that is the CPU the context does nothing, since any other one makes each call of torch slower.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _copy(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) else leaf


def _random_like(value: object) -> object:
    """Returns random numbers in a tensor's shape and range (normal ones if it is constant), anything else unchanged."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return value
    low, high = value.min().item(), value.max().item()
    made = torch.empty_like(value)
    with torch.random.fork_rng(devices=[]):
        return made.uniform_(low, high) if -1e30 < low < high < 1e30 else made.normal_()


@contextmanager
def recording() -> Iterator[list[Part]]:
    """Records the parts that run in this thread inside the block, in order."""
    before = getattr(_calls, "parts", None)
    _calls.parts = []
    try:
        yield _calls.parts
    finally:
        _calls.parts = before


def capture(
    module: fx.GraphModule,
    example_inputs: list[object],
    settings: CaptureSettings,
    part: Callable[[fx.GraphModule, list[str | None], CaptureSettings], Callable[..., object]] = Part,
) -> Callable[..., object]:
    """Returns what Dynamo is to call instead of a captured graph; `part` makes it from the graph of aten operators."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs):
        log.info("gradients are enabled: the graph runs on torch's kernels; use torch.no_grad() for inference")
        return module.forward
    names = [_name(node) for node in module.graph.nodes if node.op == "placeholder"]

    def compiler(graph: fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        same = len(names) == sum(node.op == "placeholder" for node in graph.graph.nodes)
        return part(graph, names, settings) if same else make_boxed_func(graph.forward)

    def plain(graph: fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        return make_boxed_func(graph.forward)

    try:
        return aot_module_simplified(
            module, example_inputs, fw_compiler=plain, bw_compiler=plain, inference_compiler=compiler
        )
    except Exception:  # a graph that AOTAutograd cannot handle runs as Dynamo captured it
        log.warning("a part of the model is not compiled", exc_info=True)
        return module.forward


def _name(node: fx.Node) -> str | None:
    """Returns the name of the parameter or buffer that a placeholder of Dynamo's graph stands for, else None."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    if not re.search(r"_(parameters|buffers)\[['\"]\w+['\"]\]$", name):
        return None
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]", name))


@register_backend(name="granet")
def backend(module: fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
    """Returns the compiled form of a graph: the backend of `torch.compile(model, backend="granet")`.

    Under `torch.no_grad()` the graph runs on sparse kernels where they were measured to be faster. Where gradients are
    needed, it runs on torch's kernels.
    """
    return capture(module, example_inputs, CaptureSettings())


def trace(model: nn.Module, *inputs: object) -> list[tuple[Part, tuple[object, ...]]]:
    """Returns the parts of a model and the arguments of their calls, without measuring. For tools and tests."""
    found: list[tuple[Part, tuple[object, ...]]] = []

    def part(graph: fx.GraphModule, weights: list[str | None], settings: CaptureSettings) -> Callable[..., object]:
        made = Part(graph, weights, settings)

        def call(args: list[object]) -> object:
            found.append((made, tuple(args)))
            return graph(*args)

        call._boxed_call = True
        return call

    def call(*inputs: object) -> object:
        return model(*inputs)

    own = separate(call)
    with torch.no_grad():
        torch.compile(own, backend=lambda m, e: capture(m, e, CaptureSettings(), part), dynamic=False)(*inputs)
    return found


def separate(function: types.FunctionType) -> types.FunctionType:
    """Returns a copy of a function with a code object of its own, so that Dynamo compiles it separately."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
