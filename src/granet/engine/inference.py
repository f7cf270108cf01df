"""Compiled inference: batch-norm folded, activations and sums fused, weights packed, the faster kernel per layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from granet import native
from granet.engine.graph import Stages, lower, tensors_of
from granet.engine.planner import Plan, plan_inference
from granet.engine.program import Program, Segment
from granet.reparameterize import fold, is_reparameterized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What was measured for one layer, in milliseconds, and what was chosen."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense_ms: float | None
    sparse_ms: float | None
    chosen: str
    why: str


@dataclass(frozen=True)
class InferenceReport:
    """What `compile` measured and chose; str() is a table.

    Attributes:
        layers: one row per convolution or linear layer.
        dense_ms: the whole model on torch's kernels.
        fast_ms: the whole model as compiled.
        chosen: "sparse" or "dense": what the compiled model runs.
        why: the reason in words.
        error: largest difference to the dense output, relative to that output's largest value.
        nbytes: bytes of packed weights and their index structures.
        arena_nbytes: bytes of working memory for one call.
    """

    layers: tuple[LayerReport, ...]
    dense_ms: float
    fast_ms: float
    chosen: str
    why: str
    error: float
    nbytes: int = 0
    arena_nbytes: int = 0

    def __str__(self) -> str:
        lines = [f"{'layer':<32} {'weight':<18} {'density':>7} {'dense ms':>9} {'sparse ms':>9}  chosen"]
        for row in self.layers:
            times = [f"{t:>9.3f}" if t is not None else f"{'-':>9}" for t in (row.dense_ms, row.sparse_ms)]
            shape = "x".join(map(str, row.shape))
            lines.append(f"{row.name:<32} {shape:<18} {row.density:>7.1%} {' '.join(times)}  {row.chosen}: {row.why}")
        lines.append(
            f"whole model: dense {self.dense_ms:.2f} ms, compiled {self.fast_ms:.2f} ms "
            f"({self.dense_ms / max(self.fast_ms, 1e-9):.2f}x), runs {self.chosen}: {self.why}; "
            f"largest relative difference {self.error:.1e}"
        )
        return "\n".join(lines)


class CompiledModel(nn.Module):
    """A model compiled for inference on one input shape. Other shapes run the dense model it was made from."""

    def __init__(self, model: nn.Module, plan: Plan | None, signature: tuple, report: InferenceReport):
        super().__init__()
        self.model = model
        self._plan = plan
        self._signature = signature
        self._report = report
        self._arenas: dict[Segment, list[Tensor]] = {}
        self._warned = False

    def report(self) -> InferenceReport:
        """What was measured and chosen, layer by layer."""
        return self._report

    @torch.compiler.disable
    def forward(self, *inputs: Tensor) -> object:
        """The model's output for inputs of the shapes it was compiled for."""
        if self._plan is None:
            return self._dense(*inputs)
        if signature_of(inputs) != self._signature:
            if not self._warned:
                log.warning(
                    "compiled for %s, called with %s: runs the dense model", self._signature, signature_of(inputs)
                )
                self._warned = True
            return self._dense(*inputs)
        with torch.no_grad():
            return execute(self._plan.stages, self._plan.programs, inputs, self._arenas)

    def _dense(self, *inputs: Tensor) -> object:
        with torch.no_grad():
            return self.model(*inputs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arenas": {}}


def signature_of(inputs: Sequence[object]) -> tuple:
    """Shapes, types and devices of a model's inputs."""
    return tuple((tuple(t.shape), t.dtype, t.device.type) for t in tensors_of(list(inputs)))


def execute(
    stages: Stages, programs: dict[Segment, Program], inputs: Sequence[object], arenas: dict[Segment, list[Tensor]]
) -> object:
    """The model's output: torch nodes one by one, segments in one native call each.

    `arenas` keeps working memory between calls; two threads never hold the same.
    """
    values: dict[fx.Node, object] = {}
    interpreter = fx.Interpreter(stages.graph, garbage_collect_values=False)
    arguments = iter(inputs)

    def lookup(node: fx.Node) -> object:
        return values[node]

    for item in stages.order:
        if not isinstance(item, fx.Node):
            program = programs[item]
            pool = arenas.setdefault(item, [])
            try:
                arena = pool.pop()
            except IndexError:
                arena = program.arena()
            found = program.run([values[s.key] for s in program.inputs], arena)
            pool.append(arena)
            for tensor, nodes in zip(found, stages.results.get(item, []), strict=True):
                for node in nodes:
                    shape = node.meta["tensor_meta"].shape
                    values[node] = tensor.view(shape)
        elif item.op == "placeholder":
            values[item] = next(arguments, item.args[0] if item.args else None)
        elif item.op == "output":
            return fx.map_arg(item.args[0], lookup)
        else:
            args, kwargs = fx.map_arg(item.args, lookup), fx.map_arg(item.kwargs, lookup)
            values[item] = getattr(interpreter, item.op)(item.target, args, kwargs)
    raise AssertionError("a traced model ends with an output")


def compile(model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, tolerance: float = 1e-3) -> CompiledModel:
    """A module that computes what `model` does, faster where the model's zeros allow it.

    Every layer is measured on the example inputs with torch's dense kernels and with the sparse ones; where the whole
    does not come out faster than the dense model, the dense model is what runs, and the report says so.

    Args:
        model: a model in eval mode with float32 parameters on the CPU.
        example_inputs: a tensor or a tuple of tensors of the shapes that will be run.
        tolerance: largest difference to the dense output allowed, relative to that output's largest value.

    Raises:
        ValueError: if the model is in training mode.
        RuntimeError: if the compiled model's output differs from the dense model's by more than `tolerance`.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first, so that batch-norm can be folded")
    if is_reparameterized(model):
        model = copy.deepcopy(model)
        fold(model)
    reason = _unsupported(model, inputs)
    if reason is None:
        try:
            traced = fx.symbolic_trace(model)
        # tracing runs the model's own Python on stand-ins, which fails in as many ways as there are models
        except (fx.proxy.TraceError, TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
            said = str(error).partition("\n")[0][:120]
            reason = f"torch.fx cannot trace the model ({type(error).__name__}: {said})"
    if reason is not None:
        return CompiledModel(model, None, signature_of(inputs), _dense_report(model, inputs, reason))
    with torch.no_grad():
        ShapeProp(traced).propagate(*inputs)
        plan, report = plan_inference(model, traced, inputs, tolerance, lower, execute)
    return CompiledModel(model, plan, signature_of(inputs), report)


def _unsupported(model: nn.Module, inputs: Sequence[object]) -> str | None:
    if not native.available():
        return "the sparse kernels are not available on this machine"
    for tensor in (*model.parameters(), *tensors_of(list(inputs))):
        if tensor.device.type != "cpu":
            return f"the kernels run on the CPU, not on {tensor.device.type}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"the kernels compute in float32, not in {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _dense_report(model: nn.Module, inputs: Sequence[Tensor], reason: str) -> InferenceReport:
    from granet.engine.planner import milliseconds

    with torch.no_grad():
        spent = milliseconds(lambda: model(*copy.copy(inputs)), repeats=3)
    return InferenceReport((), spent, spent, "dense", reason, 0.0)
