"""The exchanged forward of one layer: the sparse kernels where they are the faster and right, else its own forward."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from granet.engine import eager, ops, stored
from granet.engine.report import LayerReport
from granet.engine.spec import layer_spec
from granet.engine.timing import Spread, Timings
from granet.sparsifier import masking
from granet.sparsifier.sparse_storage.weight import plain_type
from granet.sparsifier.sparse_storage.weight import shape_of as stored_shape

if TYPE_CHECKING:
    from granet.sparsifier import Sparsifier

HOPELESS = 0.5  # above this density the sparse kernels are not worth measuring
ANEW_DENSE = 0.9  # a dense layer is measured again below this share of the density measured, or where it can win first
ANEW_SPARSE = 0.3  # a sparse layer is: which of the sparse kernels is the fastest may have changed
ALIKE = 0.85  # densities that differ by less count as equal for layers of one shape
DIMENSIONS = {nn.Linear: None, nn.Conv1d: 3, nn.Conv2d: 4}  # of the input; a linear layer takes any number
ROUNDED = (torch.bfloat16, torch.float16)  # what autocast converts besides float32
OUTSIDE = (
    "granet.accelerate chooses and runs its kernels outside of compiled graphs: "
    "compile without fullgraph=True, or call plan.remove() first"
)


@dataclass(frozen=True)
class Planes:
    """How a layer's activations lie for the kernels: images innermost (None: as ops.layout chooses), and their type."""

    batch: int | None = None
    bfloat16: bool = False


class Forward:
    """The exchanged `forward` of one module. A copy of the module gets its own dense forward back.

    Args:
        module: the module.
        name: its name in the sparsifier's model.
        sparsifier: the sparsifier that has its mask.
        timings: the measured times, which layers of the same shape share.
        follow: called before each forward; it brings this object up to date where the topology has changed, and returns
            whether the sparse kernels may run.

    Raises:
        ValueError: the kernels do not compute what the module does; the message says why.
    """

    def __init__(
        self, module: nn.Module, name: str, sparsifier: Sparsifier, timings: Timings, follow: Callable[[], bool]
    ):
        self.kind = _kind_of(module)
        self.module, self.name, self.spec = module, name, layer_spec(module)
        self._sparsifier, self._timings, self._follow = sparsifier, timings, follow
        self.shape = stored_shape(module) or tuple(module.weight.shape)  # of the dense weight
        self._leaf = "weight" if stored_shape(module) is None else "values"
        self.weight = module._parameters[self._leaf]  # the parameter that the sparsifier has
        self.planes = Planes()  # where the layer runs sparse
        self.runs_sparse = False
        self.sample: Tensor | None = None  # form, type and requires_grad of the example's input, on the meta device
        self.autocast: torch.dtype | None = None  # the type of autocast under which the layer was measured
        self.row = LayerReport(name, self.shape, 1.0, None, None, "dense", "not measured yet")
        self._layouts: dict[tuple, ops.Layout] = {}
        self._seen: tuple[int, int] | None = None  # the weight's memory and version when it was last looked at
        self._zero = False  # and whether it was zero where it is inactive

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's output; the argument has the name that it has in torch's own layers."""
        if torch.compiler.is_exporting():  # asked before torch.compiler.disable, at which a strict export would end
            return self.dense(input)
        return self._run(input)

    @torch.compiler.disable(reason=OUTSIDE)
    def _run(self, x: Tensor) -> Tensor:
        if eager.plain() and self._follow() and self.runs_sparse and not self.unfit(x) and self._is_clean():
            whole = torch.is_grad_enabled() and self._sparsifier.dense_grad_due
            if not (whole and self.is_stored):  # whose own forward knows what becomes of its dense gradient
                return self.sparse(x, self.planes, whole=whole)
        return self.dense(x)

    @property
    def is_stored(self) -> bool:
        """Whether the layer is in sparse storage."""
        return self._leaf == "values"

    def unfit(self, x: Tensor) -> str:
        """Why the kernels cannot compute the layer for `x`, or an empty string if they can."""
        m, weight, bias = self.module, self.module._parameters.get(self._leaf), self.module.bias
        if weight is not self.weight:
            return "its weight is not the parameter that the sparsifier has"
        autocast = eager.autocast_dtype()
        if autocast is not self.autocast:
            return f"the plan was made {autocast_words(self.autocast)} and the layer runs {autocast_words(autocast)}"
        if autocast not in (None, torch.bfloat16):
            return f"the kernels compute in float32 or bfloat16, not {autocast_words(autocast)}"
        for tensor in (x, weight) if bias is None else (x, weight, bias):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                return f"the kernels take plain tensors, not {type(tensor).__name__}, {tensor.layout}"
            if tensor.device.type != "cpu":
                return f"the kernels run on the CPU, not on {tensor.device.type}"
            if tensor.dtype != torch.float32 and not (tensor is x and autocast and x.dtype in ROUNDED):
                return f"the kernels compute in float32, not in {dtype_name(tensor.dtype)}"
        wanted = DIMENSIONS[self.kind]
        if x.dim() == 0 or (wanted and x.dim() != wanted):
            return f"the kernels take no input of shape {tuple(x.shape)}"
        if self.kind is nn.Linear:
            return "" if x.shape[-1] == m.in_features else f"the input has {x.shape[-1]} features"
        if x.shape[1] != m.in_channels:
            return f"the input has {x.shape[1]} channels"
        try:
            self.spec.output_size((1, x.shape[2]) if self.kind is nn.Conv1d else (x.shape[2], x.shape[3]))
        except ValueError as error:
            return str(error)
        return ""

    def settled(self) -> None:
        """Takes the weight as it is now for clean: the sparsifier has just seen to it."""
        self._seen, self._zero = (self.weight.data_ptr(), self.weight._version), True

    def _is_clean(self) -> bool:
        """Whether inactive weights are zero, which the kernels assume and torch's do not.

        Looked at only where somebody else than the sparsifier's optimizers has changed the weight, by loading it, say.
        """
        if self.is_stored:  # where inactive weights do not exist
            return True
        seen = (self.weight.data_ptr(), self.weight._version)
        if seen != self._seen:
            self._seen, self._zero = seen, not masking.leaks([(self._mask, [self.weight.detach()])])
        return self._zero

    def dense(self, x: Tensor) -> Tensor:
        """The layer's own forward."""
        return type(self.module).forward(self.module, x)

    def sparse(self, x: Tensor, planes: Planes, *, whole: bool = False) -> Tensor:
        """The same on the sparse kernels; `whole` asks for the weight gradient at inactive positions too."""
        if self.autocast is not None:
            x = x.to(self.autocast)
        if self.kind is nn.Linear:
            y = self._conv(x.reshape(-1, self.module.in_features), planes, whole)
            return y.view(*x.shape[:-1], self.module.out_features)
        if self.kind is nn.Conv1d:
            return self._conv(x.unsqueeze(2), planes, whole).squeeze(2)
        return self._conv(x, planes, whole)

    def _conv(self, x: Tensor, planes: Planes, whole: bool) -> Tensor:
        last = _is_channels_last(self.weight)
        key = (planes, last, *x.shape[1:])
        found = self._layouts.get(key)
        if found is None:
            how = {"bfloat16": planes.bfloat16, "channels_last": last}
            with torch.inference_mode(False):  # a training step may find it, and save it for its backward
                rest = (self.spec, tuple(x.shape), planes.batch)
                if self.is_stored:
                    found = stored.layout(self._mask, self.module.positions, *rest, planes.bfloat16)
                else:
                    found = ops.layout(self._mask, *rest, **how)
                self._layouts[key] = found
        if self.is_stored:
            return stored.conv(x, self.module, found.with_images(x.shape[0]))
        return ops.conv(x, self.weight, self.module.bias, found.with_images(x.shape[0]), whole=whole)

    @property
    def _mask(self) -> Tensor:
        return self._sparsifier.masks[f"{self.name}.weight" if self.name else "weight"]

    @property
    def density(self) -> float:
        """The share of active weights now."""
        return self._mask.count_nonzero().item() / self._mask.numel()

    def forget(self) -> None:
        """Drops what belongs to a topology that is no more."""
        self._layouts.clear()
        self._seen = None

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
            return self._settle(density, None, {}, "the model does not call it with the example inputs")
        with eager.apart():
            x = torch.zeros_like(self.sample, device="cpu").requires_grad_(self.sample.requires_grad)
            with eager.autocast(self.autocast):
                why = self.unfit(x)
            if not why and density > HOPELESS:
                why = f"too dense for the sparse kernels to win (above {HOPELESS:.0%})"
            if why:
                return self._settle(density, None, {}, why)
            x.detach().normal_()
            with eager.autocast(self.autocast):
                dy = torch.randn_like(self.dense(x))
            wanted = [t for t in (x, self.weight) if t.requires_grad]

            def both(forward: Callable[[Tensor], Tensor]) -> None:
                with eager.autocast(self.autocast):
                    y = forward(x)
                if wanted:
                    torch.autograd.grad(y, wanted, dy)

            shape = (self.spec, tuple(x.shape), x.stride(), x.dtype, self.weight.stride(), self.autocast)
            shape = (*shape, *(t.requires_grad for t in (x, self.weight)))
            alike = round(math.log(max(density, 1e-9)) / math.log(ALIKE))
            calls = {(*shape, "dense"): functools.partial(both, self.dense)}
            for planes in self._choices(x):
                forward = functools.partial(self.sparse, planes=planes)
                calls[(*shape, alike, planes)] = functools.partial(both, forward)
            dense, *sparse = self._timings.measure(calls)
        self._settle(density, dense, dict(zip(self._choices(x), sparse, strict=True)), "")

    def _settle(self, density: float, dense: Spread | None, sparse: dict[Planes, Spread], why: str) -> None:
        """Takes the faster kernel by what was measured: dense, and sparse by the planes."""
        self.planes, self.runs_sparse, dense_ms, sparse_ms = Planes(), False, None, None
        if dense is not None:
            self.planes, best = min(sparse.items(), key=lambda item: item[1].least)
            self.runs_sparse, dense_ms, sparse_ms = best.is_faster_than(dense), dense.least, best.least
            why = "faster" if self.runs_sparse else "dense is as fast"
        chosen = "sparse" if self.runs_sparse else "dense"
        self.row = LayerReport(self.name, self.shape, density, dense_ms, sparse_ms, chosen, why)
        self._layouts = {key: place for key, place in self._layouts.items() if key[0] == self.planes}

    def run_dense(self, why: str) -> None:
        """Takes the choice back, though the layer alone is faster sparse."""
        self.runs_sparse = False
        self.row = replace(self.row, chosen="dense", why=why)
        self.forget()

    def _choices(self, x: Tensor) -> list[Planes]:
        """The planes to measure for an input like `x`."""
        images = x.numel() // x.shape[-1] if self.kind is nn.Linear else x.shape[0]
        halves = [Planes(bfloat16=True)] if self.autocast and images >= ops.bfloat16_cpu()[0] // 2 else []
        if x.dim() != 4 or images < ops.cpu()[0]:
            return [Planes(), *halves]
        out = self.spec.output_size((x.shape[2], x.shape[3]))
        batches = [1, ops.cpu()[0]] if out[0] * out[1] <= 256 else [1]
        return [*map(Planes, batches), *halves]

    def __deepcopy__(self, memo: dict) -> Callable[[Tensor], Tensor]:
        module = memo.get(id(self.module), self.module)
        return types.MethodType(type(module).forward, module)

    def __reduce__(self) -> tuple:
        return getattr, (self.module, "forward")  # read before the copy has attributes of its own: its class's forward


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a type without the name of torch."""
    return str(dtype).removeprefix("torch.")


def autocast_words(dtype: torch.dtype | None) -> str:
    """Returns, for a message, under which autocast something happens."""
    return f"under {dtype_name(dtype)} autocast" if dtype else "without autocast"


def is_exchanged(module: nn.Module) -> bool:
    """Whether the module has another forward than its class's; a copy of an accelerated module has not."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _kind_of(module: nn.Module) -> type[nn.Module]:
    """Which of torch's layers the module computes. Raises ValueError if a subclass computes it in its own way."""
    for kind in DIMENSIONS:
        if isinstance(module, kind):
            own = plain_type(module)
            same = all(getattr(own, key, None) is getattr(kind, key, None) for key in ("forward", "_conv_forward"))
            if not same:
                raise ValueError(f"a {type(module).__name__} has a forward of its own")
            return kind
    raise ValueError(f"a {type(module).__name__} is none of {', '.join(kind.__name__ for kind in DIMENSIONS)}")
