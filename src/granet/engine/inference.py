"""Compiled inference: batch-norm folded, activations and sums fused, weights packed, the faster kernel per layer."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from granet import native
from granet.engine.graph import tensors_of
from granet.engine.plan import Arenas, Plan, execute
from granet.engine.planner import interleaved, milliseconds
from granet.engine.report import InferenceReport, LayerReport
from granet.engine.search import check, difference, search, verdict
from granet.reparameterize import fold, is_reparameterized

log = logging.getLogger(__name__)

SHAPES = 8  # input shapes a compiled model keeps a plan for
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)

Signature = tuple[tuple[tuple[int, ...], torch.dtype, str], ...]


class CompiledModel(nn.Module):
    """A model compiled for inference. See `compile`.

    The first call with inputs of a new shape measures and packs for that shape, which takes as long as `compile` did.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule | None, *, tolerance: float, shapes: int):
        super().__init__()
        self.model = model
        # beside the registered modules: they share the model's parameters, which a state_dict shall hold once
        self.__dict__.update(_traced=traced, _swapped=None)
        self._tolerance = tolerance
        self._shapes = shapes
        self._plans: dict[Signature, tuple[Plan | None, InferenceReport]] = {}
        self._arenas: dict[Signature, Arenas] = {}
        self._warned = False
        self._lock = threading.Lock()

    def report(self, *inputs: Tensor) -> InferenceReport:
        """What was measured and chosen for inputs of these shapes; without any, for the example inputs.

        Raises:
            ValueError: if the model was not compiled for such inputs.
        """
        if not inputs:
            return next(iter(self._plans.values()))[1]
        signature = signature_of(inputs)
        if signature not in self._plans:
            raise ValueError(f"not compiled for {_words(signature)}; it is for {self._known()}")
        return self._plans[signature][1]

    @torch.compiler.disable
    def forward(self, *inputs: Tensor) -> object:
        """The model's output."""
        if self._traced is None:
            with torch.no_grad():
                return (self.model if self._swapped is None else self._swapped)(*inputs)
        signature = signature_of(inputs)
        if signature not in self._plans and not self._prepare(signature, inputs):
            plan = None
        else:
            plan = self._plans[signature][0]
        with torch.no_grad():
            if plan is None:
                return self.model(*inputs)
            return execute(plan.stages, plan.programs, inputs, self._arenas.setdefault(signature, {}))

    def _prepare(self, signature: Signature, inputs: Sequence[Tensor]) -> bool:
        """Compiles for inputs of a new shape; False if there are as many shapes already as are allowed."""
        with self._lock:
            if signature in self._plans:
                return True
            if len(self._plans) >= self._shapes:
                if not self._warned:
                    log.warning(
                        "compiled for %d shapes, called with yet another, %s: such inputs run the dense model; "
                        "compile(..., shapes=%d) allows more",
                        len(self._plans), _words(signature), 2 * self._shapes,
                    )  # fmt: skip
                    self._warned = True
                return False
            reason = _unsupported(self.model, inputs)
            if reason is not None:
                self._plans[signature] = None, _dense_report(self.model, inputs, reason)
                return True
            traced = fx.GraphModule(self._traced, copy.deepcopy(self._traced.graph))
            with torch.no_grad():
                ShapeProp(traced).propagate(*inputs)
                self._plans[signature] = search(self.model, traced, inputs, self._tolerance)
            return True

    def _known(self) -> str:
        return "; ".join(map(_words, self._plans))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arenas": {}, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, "_lock": threading.Lock()})


def signature_of(inputs: Sequence[object]) -> Signature:
    """Shapes, types and devices of a model's inputs."""
    return tuple((tuple(t.shape), t.dtype, t.device.type) for t in tensors_of(list(inputs)))


def _words(signature: Signature) -> str:
    return ", ".join("x".join(map(str, shape)) for shape, _, _ in signature)


def compile(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, tolerance: float = 1e-3, shapes: int = SHAPES
) -> CompiledModel:
    """A module that computes what `model` does, faster where the model's zeros allow it.

    Every layer is measured on the example inputs with torch's dense kernels and with the sparse ones; where the whole
    does not come out faster than the dense model, the dense model is what runs, and the report says so. Inputs of
    another shape are measured when they first come. A model that torch.fx cannot trace runs as it is, with those of
    its layers on sparse kernels that are faster so.

    Args:
        model: a model in eval mode with float32 parameters on the CPU.
        example_inputs: a tensor or a tuple of tensors of the shapes that will be run.
        tolerance: largest difference to the dense output allowed, relative to that output's largest value.
        shapes: how many input shapes to compile for; any further ones run the dense model.

    Raises:
        ValueError: if the model is in training mode, or `shapes` is less than 1.
        RuntimeError: if the compiled model's output differs from the dense model's by more than `tolerance`.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first, so that batch-norm can be folded")
    if shapes < 1:
        raise ValueError(f"shapes is the number of input shapes to compile for, at least 1, not {shapes}")
    if is_reparameterized(model):
        model = copy.deepcopy(model)
        fold(model)
    reason = _unsupported(model, inputs)
    traced = None
    if reason is None:
        try:
            traced = fx.symbolic_trace(model)
        # tracing runs the model's own Python on stand-ins, which fails in as many ways as there are models
        except (fx.proxy.TraceError, TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
            said = str(error).partition("\n")[0][:120]
            untraceable = f"torch.fx cannot trace the model ({type(error).__name__}: {said})"
    fast = CompiledModel(model, traced, tolerance=tolerance, shapes=shapes)
    if traced is not None:
        fast._prepare(signature_of(inputs), inputs)
    elif reason is not None:
        fast._plans[signature_of(inputs)] = None, _dense_report(model, inputs, reason)
    else:
        fast.__dict__["_swapped"], report = _swap(model, inputs, untraceable, tolerance=tolerance, shapes=shapes)
        fast._plans[signature_of(inputs)] = None, report
    return fast


def _swap(
    model: nn.Module, inputs: Sequence[Tensor], untraceable: str, *, tolerance: float, shapes: int
) -> tuple[nn.Module | None, InferenceReport]:
    """A twin of the model that shares its tensors and runs single layers compiled, or None where that does not pay."""
    seen: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if type(module) in LAYERS}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].detach().clone()))
        for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            expected = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    rows, packed = [], [0, 0]
    for name, module in layers.items():
        shape, density = tuple(module.weight.shape), module.weight.count_nonzero().item() / module.weight.numel()
        if name not in seen:
            why = "not called with the example inputs"
            rows.append(LayerReport(name, shape, density, None, None, "dense", why))
            continue
        fast = compile(nn.Sequential(module).eval(), seen[name], tolerance=tolerance, shapes=shapes)
        found = fast.report()
        sparse = found.chosen == "sparse"
        if sparse:
            twin.get_submodule(name).forward = fast.forward
            packed = [packed[0] + found.nbytes, packed[1] + found.arena_nbytes]
        sparse_ms = found.fast_ms if sparse else None
        rows.append(LayerReport(name, shape, density, found.dense_ms, sparse_ms, found.chosen, found.why))
    with torch.no_grad():
        error = difference(expected, twin(*inputs))
        check(error, tolerance)
        times = interleaved([lambda: model(*inputs), lambda: twin(*inputs)], repeats=3, enough=0.5)
    report = verdict(rows, *times, error, tuple(packed), note=f", layer by layer: {untraceable}")
    return (twin if report.chosen == "sparse" else None), report


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
    with torch.no_grad():
        spent = milliseconds(lambda: model(*inputs), repeats=3)
    return InferenceReport((), spent, spent, "dense", reason, 0.0)
