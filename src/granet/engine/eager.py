"""Detection of plain calls: torch just computes numbers, and nothing transforms, records or exports the computation.

The transforms of torch do not know the operator behind the kernels. While one of them is active, the layers run
torch's own operators, which work under all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad, graph


def transformed() -> bool:
    """Returns whether a functorch transform (grad, vmap, jvp, functionalize) or forward-mode derivatives are active."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def recorded() -> bool:
    """Returns whether operators are exported, traced, or passed to a dispatch mode (fake tensors, make_fx, ...)."""
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def plain() -> bool:
    """Returns whether the call is a plain one, neither transformed nor recorded."""
    return not transformed() and not recorded()


def autocast_dtype() -> torch.dtype | None:
    """Returns the type to which autocast on the CPU rounds now, or None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Runs the block under autocast to `dtype`, or without autocast; weights are rounded anew in each block."""
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield
    torch.clear_autocast_cache()  # which only the outermost block does by itself


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Runs the block as in a training step, whatever modes the caller has set, and restores the random state.

    A measurement may fall into an evaluation's forward pass, or into a checkpointed block that counts saved tensors.
    Autocast is off; see `autocast`.
    """
    hooks = contextlib.nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        hooks = graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # these replace the caller's
    recording = contextlib.ExitStack()
    for mode in (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), hooks):
        recording.enter_context(mode)
    with recording, torch.random.fork_rng(devices=[]):
        yield
