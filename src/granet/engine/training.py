"""Sparse compute for training: forward and backward of the layers it pays for run on the sparse kernels.

Parameters stay the dense tensors they are; only the modules' `forward` is exchanged, and given back by `remove()`.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from granet import native
from granet.engine import ops
from granet.engine.planner import NOISE, interleaved
from granet.engine.spec import Spec, spec_of
from granet.reparameterize import is_reparameterized

if TYPE_CHECKING:
    from granet.sparsifier import Sparsifier

log = logging.getLogger(__name__)

REPLAN = 0.7  # a layer is measured again when its density has fallen below this share of what was measured
HOPELESS = 0.5  # above this density the sparse kernels are not worth measuring


@dataclass(frozen=True)
class LayerReport:
    """What was measured for one layer: forward and backward, in milliseconds, at the density it had then."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense_ms: float | None
    sparse_ms: float | None
    chosen: str
    why: str


@dataclass(frozen=True)
class TrainingReport:
    """The plan as it stands, one row per sparse layer; str() is a table."""

    layers: tuple[LayerReport, ...]
    why: str

    @property
    def dense_ms(self) -> float:
        """Forward and backward of all measured layers on torch's dense kernels."""
        return sum(row.dense_ms or 0.0 for row in self.layers)

    @property
    def planned_ms(self) -> float:
        """The same as planned: the faster of the two for every layer."""
        return sum((row.sparse_ms if row.chosen == "sparse" else row.dense_ms) or 0.0 for row in self.layers)

    def __str__(self) -> str:
        lines = [f"{'layer':<32} {'weight':<18} {'density':>7} {'dense ms':>9} {'sparse ms':>9}  chosen"]
        for row in self.layers:
            times = [f"{t:>9.3f}" if t is not None else f"{'-':>9}" for t in (row.dense_ms, row.sparse_ms)]
            shape = "x".join(map(str, row.shape))
            lines.append(f"{row.name:<32} {shape:<18} {row.density:>7.1%} {' '.join(times)}  {row.chosen}: {row.why}")
        swapped = sum(row.chosen == "sparse" for row in self.layers)
        lines.append(
            f"forward + backward of these layers: dense {self.dense_ms:.2f} ms, as planned {self.planned_ms:.2f} ms; "
            f"{swapped} of {len(self.layers)} run sparse. {self.why}"
        )
        return "\n".join(lines)


class Forward:
    """The exchanged `forward` of one module. A copy of the module gets its own dense forward back."""

    def __init__(self, module: nn.Module, name: str, sparsifier: Sparsifier, spec: Spec):
        self.module, self.name, self.sparsifier, self.spec = module, name, sparsifier, spec
        self.batch: int | None = None  # images innermost, where the layer runs sparse
        self.runs_sparse = False
        self.sample: Tensor | None = None  # shape, strides and requires_grad of the input, on the meta device
        self.row = LayerReport(name, tuple(module.weight.shape), 1.0, None, None, "dense", "not measured yet")
        self._layouts: dict[tuple[int, ...], ops.Layout] = {}
        self._version = -1

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        if self._version != self.sparsifier.version:
            self._layouts.clear()
            self._version = self.sparsifier.version
            if self.sample is not None and self.density < REPLAN * self.row.density:
                self.plan()
        if not self.runs_sparse or not self._fits(x):
            return self.dense(x)
        if torch.is_grad_enabled() and self.sparsifier.dense_grad_due:
            return self.dense(x)
        return self.sparse(x, self.batch)

    def _fits(self, x: Tensor) -> bool:
        plain = x.dtype == torch.float32 == self.module.weight.dtype and x.device.type == "cpu"
        dims = {nn.Linear: x.dim() >= 1, nn.Conv1d: x.dim() == 3, nn.Conv2d: x.dim() == 4}
        return plain and dims.get(type(self.module), False) and not torch.is_autocast_enabled("cpu")

    def dense(self, x: Tensor) -> Tensor:
        """The layer's own forward."""
        return type(self.module).forward(self.module, x)

    def sparse(self, x: Tensor, batch: int | None) -> Tensor:
        """The same on the sparse kernels."""
        m = self.module
        if isinstance(m, nn.Linear):
            rows = x.reshape(-1, m.in_features)
            y = ops.conv(rows, m.weight, m.bias, self._layout(rows, batch))
            return y.view(*x.shape[:-1], m.out_features)
        if isinstance(m, nn.Conv1d):
            image = x.unsqueeze(2)
            return ops.conv(image, m.weight, m.bias, self._layout(image, batch)).squeeze(2)
        return ops.conv(x, m.weight, m.bias, self._layout(x, batch))

    def _layout(self, x: Tensor, batch: int | None) -> ops.Layout:
        key = (batch or 0, *x.shape[1:])
        found = self._layouts.get(key)
        if found is None:
            mask = self.sparsifier.masks[f"{self.name}.weight" if self.name else "weight"]
            found = self._layouts[key] = ops.layout(mask, self.spec, tuple(x.shape), batch)
        return found.with_images(x.shape[0])

    @property
    def density(self) -> float:
        """The share of active weights now."""
        mask = self.sparsifier.masks[f"{self.name}.weight" if self.name else "weight"]
        return mask.count_nonzero().item() / mask.numel()

    def plan(self) -> None:
        """Measures dense against sparse at the present density and takes the faster."""
        density = self.density
        self._version = self.sparsifier.version
        self._layouts.clear()
        if self.sample is None:
            return self._settle(density, None, {}, "not called with the example inputs")
        x = torch.zeros_like(self.sample, device="cpu").requires_grad_(self.sample.requires_grad)
        if not self._fits(x):
            return self._settle(density, None, {}, f"input of type {x.dtype} is not supported")
        if density > HOPELESS:
            return self._settle(density, None, {}, f"too dense for the sparse kernels to win (above {HOPELESS:.0%})")
        with torch.enable_grad(), self._quiet():
            x.detach().normal_()
            dy = torch.randn_like(self.dense(x))

            def both(forward: Callable[[Tensor], Tensor]) -> None:
                torch.autograd.grad(forward(x), [t for t in (x, self.module.weight) if t.requires_grad], dy)

            batches = self._batches(x)
            calls = [functools.partial(both, self.dense)]
            calls += [functools.partial(both, functools.partial(self.sparse, batch=b)) for b in batches]
            dense_ms, *sparse_ms = interleaved(calls, repeats=3)
        self._settle(density, dense_ms, dict(zip(batches, sparse_ms, strict=True)), "")

    def _settle(self, density: float, dense_ms: float | None, spent: dict[int | None, float], why: str) -> None:
        self.batch = min(spent, key=spent.get) if spent else None
        sparse_ms = spent[self.batch] if spent else None
        self.runs_sparse = bool(spent) and sparse_ms < dense_ms * (1 - NOISE)
        if spent:
            why = "faster" if self.runs_sparse else "dense is as fast"
        chosen = "sparse" if self.runs_sparse else "dense"
        self.row = LayerReport(self.name, tuple(self.module.weight.shape), density, dense_ms, sparse_ms, chosen, why)
        self._layouts = {key: place for key, place in self._layouts.items() if key[0] == (self.batch or 0)}

    def _batches(self, x: Tensor) -> list[int | None]:
        if x.dim() != 4 or x.shape[0] < ops.cpu()[0]:
            return [None]
        out = self.spec.output_size((x.shape[2], x.shape[3]))
        return [1, ops.cpu()[0]] if out[0] * out[1] <= 256 else [1]

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Leaves the global random generator as it was, so that a planned run draws the same numbers."""
        with torch.random.fork_rng(devices=[]):
            yield

    def __deepcopy__(self, memo: dict) -> Callable[[Tensor], Tensor]:
        return _own_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple:
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return types.MethodType(type(module).forward, module)


class TrainingPlan:
    """The layers of a model that run sparse while it trains. See `accelerate`."""

    def __init__(self, forwards: list[Forward], why: str):
        self._forwards = forwards
        self._why = why

    def report(self) -> TrainingReport:
        """What was measured for every sparse layer, and what was chosen."""
        rows = tuple(replace(f.row) for f in self._forwards)
        return TrainingReport(rows, self._why)

    def replan(self) -> None:
        """Measures every layer again, at the density it has now."""
        for forward in self._forwards:
            forward.plan()

    def remove(self) -> None:
        """Gives every module its own forward back."""
        for forward in self._forwards:
            if forward.module.__dict__.get("forward") is forward:
                del forward.module.forward
        self._forwards = []
        self._why = "removed"


def accelerate(
    sparsifier: Sparsifier, example_inputs: Tensor | tuple, *, model: nn.Module | None = None
) -> TrainingPlan:
    """A plan under which the sparsifier's model trains with sparse kernels wherever they are measured to be faster.

    Weights and their names stay as they are. The weight gradient is computed at active positions only, except in steps
    after which the method needs the dense one; these run on torch's kernels. Layers are measured again as their density
    falls. Where nothing wins, or the kernels cannot be had, nothing changes and the report says why.

    Args:
        sparsifier: the sparsifier of the model; its topology is followed.
        example_inputs: a tensor or tuple of tensors as the model is trained with, batch size included.
        model: the module to call with them; the sparsifier's model if None.
    """
    model = sparsifier.model if model is None else model
    if is_reparameterized(sparsifier.model):
        name = type(sparsifier.method).__name__
        return TrainingPlan([], f"{name} trains other weights than those it computes with, which the kernels cannot.")
    if not native.available():
        return TrainingPlan([], "The sparse kernels are not available on this machine.")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    forwards = []
    for name, module in sparsifier.model.named_modules():
        if (f"{name}.weight" if name else "weight") not in sparsifier.masks or "forward" in module.__dict__:
            continue
        try:
            forwards.append(Forward(module, name, sparsifier, spec_of(module)))
        except ValueError as error:
            log.info("%s stays dense: %s", name, error)
    ops.prepare()
    _record(model, inputs, forwards)
    for forward in forwards:
        forward.plan()
        forward.module.forward = forward
    return TrainingPlan(forwards, "")


def _record(model: nn.Module, inputs: tuple, forwards: list[Forward]) -> None:
    """Notes the shape each layer's input has, by running the model once; its buffers and mode are put back."""

    def note(forward: Forward) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            (x,) = args
            forward.sample = torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)

        return hook

    hooks = [f.module.register_forward_hook(note(f)) for f in forwards]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
