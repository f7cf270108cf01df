"""Whether a call is a plain one: torch computes numbers, and nobody transforms, records or exports what it does.

The kernels are an operator that torch's transforms do not know. Where one is in force, the layers run torch's own
operators instead, which are right under all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad, graph


def transformed() -> bool:
    """Whether a functorch transform (grad, vmap, jvp, functionalize) or a level of forward-mode derivatives is open."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether operators are exported, traced, or handed to a dispatch mode (fake tensors, make_fx, a FLOP counter)."""
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def plain() -> bool:
    """Whether neither is so."""
    return not transformed() and not recorded()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Gradients are recorded as in a training step, whatever modes the caller has set; random state is put back.

    A measurement may fall into the forward of an evaluation, or into a checkpointed block that counts saved tensors.
    """
    hooks = contextlib.nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        hooks = graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # the last ones set are called
    recording = contextlib.ExitStack()
    for mode in (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), hooks):
        recording.enter_context(mode)
    with recording, torch.random.fork_rng(devices=[]):
        yield
