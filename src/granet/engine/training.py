"""Sparse compute for training: forward and backward of the layers it pays for run on the sparse kernels.

Parameters stay the dense tensors they are; only the modules' `forward` is exchanged, and given back by `remove()`.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from granet import native
from granet.engine import ops
from granet.engine.graph import tensors_of
from granet.engine.planner import NOISE, interleaved, seconds
from granet.engine.report import LayerReport, layer_table
from granet.engine.spec import Spec, spec_of
from granet.reparameterize import is_reparameterized

if TYPE_CHECKING:
    from granet.sparsifier import Sparsifier

log = logging.getLogger(__name__)

HOPELESS = 0.5  # above this density the sparse kernels are not worth measuring
ANEW_DENSE = 0.9  # a dense layer is measured again below this share of the density measured, or where it can win first
ANEW_SPARSE = 0.3  # a sparse layer is: which of the sparse kernels is the fastest may have changed
ALIKE = 0.85  # densities that differ by less count as equal for layers of one shape
CLEAR = 0.9  # a whole step below this share of the dense one is believed at once
ROUNDS = 4  # of a whole step, where it is not clear


@dataclass(frozen=True)
class TrainingReport:
    """The plan as it stands, one row per sparse layer at the density it had when measured; str() is a table.

    A layer's milliseconds are those of forward and backward together.
    """

    layers: tuple[LayerReport, ...]
    why: str
    whole_dense_ms: float | None = None  # forward and backward of the whole model, when it was measured
    whole_fast_ms: float | None = None

    @property
    def dense_ms(self) -> float:
        """Forward and backward of all measured layers on torch's dense kernels."""
        return sum(row.dense_ms or 0.0 for row in self.layers)

    @property
    def planned_ms(self) -> float:
        """The same as planned: the faster of the two for every layer."""
        return sum((row.sparse_ms if row.chosen == "sparse" else row.dense_ms) or 0.0 for row in self.layers)

    def __str__(self) -> str:
        lines = layer_table(self.layers)
        swapped = sum(row.chosen == "sparse" for row in self.layers)
        lines.append(
            f"forward + backward of these layers: dense {self.dense_ms:.2f} ms, as planned {self.planned_ms:.2f} ms; "
            f"{swapped} of {len(self.layers)} run sparse. {self.why}"
        )
        return "\n".join(lines)


class Forward:
    """The exchanged `forward` of one module. A copy of the module gets its own dense forward back."""

    def __init__(self, module: nn.Module, name: str, plan: TrainingPlan, spec: Spec):
        self.module, self.name, self.plan, self.spec = module, name, plan, spec
        self.batch: int | None = None  # images innermost, where the layer runs sparse
        self.runs_sparse = False
        self.sample: Tensor | None = None  # shape, strides and requires_grad of the input, on the meta device
        self.row = LayerReport(name, tuple(module.weight.shape), 1.0, None, None, "dense", "not measured yet")
        self._layouts: dict[tuple[int, ...], ops.Layout] = {}

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        self.plan.follow()
        if not self.runs_sparse or not self.plan.enabled or not self._fits(x):
            return self.dense(x)
        whole = torch.is_grad_enabled() and self.plan.sparsifier.dense_grad_due
        return self.sparse(x, self.batch, whole=whole)

    def _fits(self, x: Tensor) -> bool:
        plain = x.dtype == torch.float32 == self.module.weight.dtype and x.device.type == "cpu"
        dims = {nn.Linear: x.dim() >= 1, nn.Conv1d: x.dim() == 3, nn.Conv2d: x.dim() == 4}
        return plain and dims.get(type(self.module), False) and not torch.is_autocast_enabled("cpu")

    def dense(self, x: Tensor) -> Tensor:
        """The layer's own forward."""
        return type(self.module).forward(self.module, x)

    def sparse(self, x: Tensor, batch: int | None, *, whole: bool = False) -> Tensor:
        """The same on the sparse kernels; `whole` asks for the weight gradient at inactive positions too."""
        m = self.module
        if isinstance(m, nn.Linear):
            y = self._conv(x.reshape(-1, m.in_features), batch, whole)
            return y.view(*x.shape[:-1], m.out_features)
        if isinstance(m, nn.Conv1d):
            return self._conv(x.unsqueeze(2), batch, whole).squeeze(2)
        return self._conv(x, batch, whole)

    def _conv(self, x: Tensor, batch: int | None, whole: bool) -> Tensor:
        key = (batch or 0, *x.shape[1:])
        found = self._layouts.get(key)
        if found is None:
            found = self._layouts[key] = ops.layout(self._mask, self.spec, tuple(x.shape), batch)
        place = found.with_images(x.shape[0])
        conv = ops.DenseGradient.apply if whole else ops.conv
        return conv(x, self.module.weight, self.module.bias, place)

    @property
    def _mask(self) -> Tensor:
        return self.plan.sparsifier.masks[f"{self.name}.weight" if self.name else "weight"]

    @property
    def density(self) -> float:
        """The share of active weights now."""
        return self._mask.count_nonzero().item() / self._mask.numel()

    def forget(self) -> None:
        """Drops what belongs to a topology that is no more."""
        self._layouts.clear()

    @property
    def worth_measuring(self) -> bool:
        """Whether the density has fallen so far that another choice may be the faster.

        A sparse kernel's time falls at most in proportion to the density, so where it lost to the dense one it cannot
        win before the density has fallen by their ratio.
        """
        if self.sample is None:
            return False
        share = ANEW_SPARSE if self.runs_sparse else ANEW_DENSE
        if not self.runs_sparse and self.row.sparse_ms:
            share = min(share, self.row.dense_ms / self.row.sparse_ms)
        return self.density < share * self.row.density

    def measure(self) -> None:
        """Measures dense against sparse at the present density and takes the faster."""
        density = self.density
        if self.sample is None:
            return self._settle(density, None, {}, "not called with the example inputs")
        x = torch.zeros_like(self.sample, device="cpu").requires_grad_(self.sample.requires_grad)
        if not self._fits(x):
            return self._settle(density, None, {}, f"input of type {x.dtype} is not supported")
        if density > HOPELESS:
            return self._settle(density, None, {}, f"too dense for the sparse kernels to win (above {HOPELESS:.0%})")
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            x.detach().normal_()
            dy = torch.randn_like(self.dense(x))

            def both(forward: Callable[[Tensor], Tensor]) -> None:
                torch.autograd.grad(forward(x), [t for t in (x, self.module.weight) if t.requires_grad], dy)

            shape = (self.spec, tuple(x.shape), x.stride(), x.requires_grad)
            alike = round(math.log(max(density, 1e-9)) / math.log(ALIKE))
            calls = {(*shape, "dense"): functools.partial(both, self.dense)}
            for batch in self._batches(x):
                forward = functools.partial(self.sparse, batch=batch)
                calls[(*shape, alike, batch)] = functools.partial(both, forward)
            dense_ms, *sparse_ms = self.plan.timings(calls)
        self._settle(density, dense_ms, dict(zip(self._batches(x), sparse_ms, strict=True)), "")

    def _settle(self, density: float, dense_ms: float | None, spent: dict[int | None, float], why: str) -> None:
        self.batch = min(spent, key=spent.get) if spent else None
        sparse_ms = spent[self.batch] if spent else None
        self.runs_sparse = bool(spent) and sparse_ms < dense_ms * (1 - NOISE)
        if spent:
            why = "faster" if self.runs_sparse else "dense is as fast"
        chosen = "sparse" if self.runs_sparse else "dense"
        self.row = LayerReport(self.name, tuple(self.module.weight.shape), density, dense_ms, sparse_ms, chosen, why)
        self._layouts = {key: place for key, place in self._layouts.items() if key[0] == (self.batch or 0)}

    def run_dense(self, why: str) -> None:
        """Takes the choice back, though the layer alone is faster sparse."""
        self.runs_sparse = False
        self.row = replace(self.row, chosen="dense", why=why)
        self.forget()

    def _batches(self, x: Tensor) -> list[int | None]:
        if x.dim() != 4 or x.shape[0] < ops.cpu()[0]:
            return [None]
        out = self.spec.output_size((x.shape[2], x.shape[3]))
        return [1, ops.cpu()[0]] if out[0] * out[1] <= 256 else [1]

    def __deepcopy__(self, memo: dict) -> Callable[[Tensor], Tensor]:
        return _own_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple:
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return types.MethodType(type(module).forward, module)


class TrainingPlan:
    """The layers of a model that run sparse while it trains. See `accelerate`."""

    def __init__(self, sparsifier: Sparsifier, model: nn.Module, inputs: tuple):
        self.sparsifier, self.model, self.inputs = sparsifier, model, inputs
        self.enabled = True  # False while the model is timed without the sparse kernels
        self.forwards: list[Forward] = []
        self.dense_ms: float | None = None  # forward and backward of the whole model, as last measured
        self.fast_ms: float | None = None
        self.why = ""
        self._confirmed = False  # the whole model has been measured to be faster
        self._known: dict[tuple, float] = {}
        self._version = sparsifier.version

    def report(self) -> TrainingReport:
        """What was measured for every sparse layer, and what was chosen."""
        return TrainingReport(tuple(f.row for f in self.forwards), self.why, self.dense_ms, self.fast_ms)

    def follow(self) -> None:
        """Takes note of a topology that has changed: each layer calls this before it runs."""
        if self._version == self.sparsifier.version:
            return
        self._version = self.sparsifier.version
        for forward in self.forwards:
            forward.forget()
        self._measure([f for f in self.forwards if f.worth_measuring])

    def replan(self) -> None:
        """Measures every layer again, at the density it has now, and the whole model."""
        self._version, self._confirmed = self.sparsifier.version, False
        self._known.clear()
        for forward in self.forwards:
            forward.forget()
        self._measure(self.forwards)

    def timings(self, calls: dict[tuple, Callable[[], object]]) -> list[float]:
        """Milliseconds of the calls, measured now unless one of the same key was: layers of a shape are measured once.

        All that is missing is measured in turns, so that noise hits it alike.
        """
        missing = [key for key in calls if key not in self._known]
        self._known |= dict(zip(missing, interleaved([calls[k] for k in missing], repeats=2, enough=0.02), strict=True))
        return [self._known[key] for key in calls]

    def _measure(self, forwards: list[Forward]) -> None:
        for forward in forwards:
            forward.measure()
        chosen = [f for f in self.forwards if f.runs_sparse]
        if not chosen:
            self.why = "Nothing wins: the model runs as without the engine."
        elif not self._confirmed:
            self._judge(chosen)

    def _judge(self, chosen: list[Forward]) -> None:
        """Keeps the choice if the whole model's forward and backward are faster with it, else takes all of it back."""
        saved = sum(f.row.dense_ms - f.row.sparse_ms for f in chosen)
        if self.dense_ms is not None and saved < NOISE * self.dense_ms:
            self.why = f"The layers' gain of {saved:.2f} ms is within the noise of the whole, {self.dense_ms:.2f} ms."
        else:
            dense, fast = [], []
            for _ in range(ROUNDS):
                dense.append(self._whole(enabled=False))
                fast.append(self._whole(enabled=True))
                if min(fast) < CLEAR * min(dense):
                    break
            self.dense_ms, self.fast_ms = min(dense), min(fast)
            self._confirmed = self.fast_ms < self.dense_ms * (1 - NOISE)
            took = f"took {self.fast_ms:.2f} ms with the sparse kernels, {self.dense_ms:.2f} ms without"
            self.why = f"The whole model's forward + backward {took}"
            self.why += "." if self._confirmed else ": nothing wins, all layers run dense."
        if not self._confirmed:
            log.info("%s", self.why)
            for forward in chosen:
                forward.run_dense("faster alone, but not in the whole model")

    def _whole(self, *, enabled: bool) -> float:
        """Milliseconds of one forward and backward of the model; no gradient, buffer or random state is changed."""
        self.enabled = enabled
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]), _evaluating(self.model):
                start = seconds()
                outputs = tensors_of([self.model(*self.inputs)])
                total = sum(t.sum() for t in outputs if t.requires_grad)
                torch.autograd.grad(total, wanted, allow_unused=True)
                return (seconds() - start) * 1e3
        finally:
            self.enabled = True

    def remove(self) -> None:
        """Gives every module its own forward back."""
        for forward in self.forwards:
            if forward.module.__dict__.get("forward") is forward:
                del forward.module.forward
        self.forwards = []
        self.why = "removed"


def accelerate(
    sparsifier: Sparsifier, example_inputs: Tensor | tuple, *, model: nn.Module | None = None
) -> TrainingPlan:
    """A plan under which the sparsifier's model trains with sparse kernels wherever they are measured to be faster.

    Weights and their names stay as they are. The weight gradient is computed at active positions only, except in steps
    after which the method needs the dense one. Layers are measured again as their density falls, and the whole model's
    forward and backward, with and without, once the first of them win. Where nothing wins, or the kernels cannot be
    had, nothing changes and the report says why.

    Args:
        sparsifier: the sparsifier of the model; its topology is followed.
        example_inputs: a tensor or tuple of tensors as the model is trained with, batch size included.
        model: the module to call with them; the sparsifier's model if None.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    plan = TrainingPlan(sparsifier, sparsifier.model if model is None else model, inputs)
    if is_reparameterized(sparsifier.model):
        name = type(sparsifier.method).__name__
        plan.why = f"{name} trains other weights than those it computes with, which the kernels cannot."
        return plan
    if not native.available():
        plan.why = "The sparse kernels are not available on this machine."
        return plan
    for name, module in sparsifier.model.named_modules():
        if (f"{name}.weight" if name else "weight") not in sparsifier.masks or "forward" in module.__dict__:
            continue
        try:
            plan.forwards.append(Forward(module, name, plan, spec_of(module)))
        except ValueError as error:
            log.info("%s stays dense: %s", name, error)
    ops.prepare()
    _record(plan)
    for forward in plan.forwards:
        forward.module.forward = forward
    plan.replan()
    return plan


def _record(plan: TrainingPlan) -> None:
    """Notes the shape each layer's input has, by running the model once."""

    def note(forward: Forward) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            (x,) = args
            forward.sample = torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)

        return hook

    hooks = [f.module.register_forward_hook(note(f)) for f in plan.forwards]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), _evaluating(plan.model):
            plan.model(*plan.inputs)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, so that its buffers stay as they are, and each module's mode put back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
