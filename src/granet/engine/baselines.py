"""The ways in which a user could run a dense model instead of a compiled one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from granet.engine.graph import tensors_of
from granet.engine.timing import Spread

AS_IS = "dense"


def dense_calls(model: nn.Module, inputs: tuple, named: dict, precision: str) -> dict[str, Callable[[], object]]:
    """Returns calls of the dense model by name, all with copies of the same inputs.

    They are the model as it is; where images are among the inputs, in the other memory format too; and where the
    compiled model is to compute in reduced precision, under bfloat16 autocast.
    """
    calls = {AS_IS: lambda: model(*_copies(inputs), **_copies(named))}
    images = [t for t in tensors_of([inputs, named]) if t.dim() == 4 and t.is_floating_point()]
    formats: dict[str, torch.memory_format | None] = {"": None}
    if images and any(p.dim() == 4 for p in model.parameters()):
        last = all(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in images)
        formats |= {", contiguous": torch.contiguous_format} if last else {", channels_last": torch.channels_last}
    for label, layout in formats.items():
        weights = {} if layout is None else {n: _laid_out(p.detach(), layout) for n, p in model.named_parameters()}
        for rounded in (False, True) if precision != "float32" else (False,):
            if layout is None and not rounded:
                continue

            def call(
                weights: dict[str, Tensor] = weights,
                layout: torch.memory_format | None = layout,
                rounded: bool = rounded,
            ) -> object:
                arguments, keywords = _copies((inputs, named), layout)
                with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                    return functional_call(model, weights, arguments, keywords)

            calls[f"{AS_IS}{', bfloat16 autocast' * rounded}{label}"] = call
    return calls


def faster_one(dense: Mapping[str, Spread], fast: Spread) -> str | None:
    """Returns the name of the fastest dense call that the compiled model does not beat, None if it beats them all."""
    ahead = [name for name, spread in dense.items() if not fast.is_faster_than(spread)]
    return min(ahead, key=lambda name: dense[name].least, default=None)


def _copies(values: object, layout: torch.memory_format | None = None) -> object:
    return tree_map(lambda leaf: _laid_out(leaf.detach().clone(), layout) if isinstance(leaf, Tensor) else leaf, values)


def _laid_out(tensor: Tensor, layout: torch.memory_format | None) -> Tensor:
    return tensor if layout is None or tensor.dim() != 4 else tensor.contiguous(memory_format=layout)
