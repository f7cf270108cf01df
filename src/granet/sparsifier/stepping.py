"""Helpers around an optimizer's step: closures, buffers, learning rates, and marks of a gradient scaler."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import shards
from granet.sparsifier import quantised
from granet.sparsifier.quantised import Codes


def then(closure: Callable, after: Callable[[], None]):
    """Returns what `closure` returns, and calls `after` after it; only `closure` runs with gradients enabled."""
    with torch.enable_grad():
        loss = closure()
    after()
    return loss


def parameters_of(optimizers) -> list[nn.Parameter]:
    """All that the optimizers hold, in their order, each once: one inside of another holds the same ones."""
    return list({id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}.values())


def forget_gradients(optimizers) -> None:
    """Leave the optimizers without a gradient, so that their step does nothing."""
    for p in parameters_of(optimizers):
        p.grad = None


def moves(optimizers) -> bool:
    """Whether a step of the optimizers can move anything: not while a warm-up starts from a learning rate of zero."""
    return any(float(group.get("lr", 1)) for optimizer in optimizers for group in optimizer.param_groups)


def learning_rates(optimizers, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The learning rate of each named parameter, 0 for one that is frozen or that no optimizer holds."""
    rates = {id(p): float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"]}
    return {name: rates.get(id(p), 0.0) if p.requires_grad else 0.0 for name, p in parameters.items()}


def buffers(optimizers, parameter: Tensor) -> list[Tensor | Codes]:
    """What the optimizers remember of each weight of `parameter`: every buffer of its shape that holds numbers.

    Raises:
        ValueError: one holds codes of numbers, and the optimizer has no table that says which of them is zero.
    """
    states = {id(o.state[parameter]): o.state[parameter] for o in optimizers if parameter in o.state}
    return [
        quantised.found(key, value, state)
        for state in states.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype != torch.bool
    ]


def mixed(kept: Tensor | None, grad: Tensor, keep: float, add: float) -> Tensor:
    """`keep * kept + add * grad`, in float32 at least unless it is a mere copy; `kept` is changed in place."""
    if keep == 0 and add == 1:
        return grad.clone()
    if kept is None or keep == 0:
        return grad.to(torch.promote_types(grad.dtype, torch.float32)).mul(add)
    return kept.mul_(keep).add_(grad, alpha=add)


def keep(
    kept: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], old: float, new: float, scale: Tensor | None
) -> None:
    """Update the kept gradients with those of this step, unscaled: `old * kept + new * grad`."""
    for name, p in parameters.items():
        if p.grad is not None:
            kept[name] = mixed(kept.get(name), p.grad if scale is None else p.grad / scale, old, new)


def clip(parameters: Iterable[nn.Parameter], masks: Mapping[nn.Parameter, Tensor], max_norm: float) -> Tensor:
    """Returns the norm of the gradients inside `masks`; scales all gradients down if it exceeds `max_norm`."""
    held = [p for p in parameters if p.grad is not None]
    # a product with the mask would keep what is not finite
    live = [p.grad.masked_fill(masks[p].logical_not(), 0) if p in masks else p.grad for p in held]
    if not any(map(shards.is_sharded, live)):
        norm = torch.nn.utils.get_total_norm(live)
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, norm)
        return norm
    # torch sums up within one mesh only, and with tensor parallelism parameters lie in several
    squares = sum(shards.total(grad.detach().double().square()) for grad in live)
    norm = torch.tensor(squares**0.5, device=live[0].device, dtype=live[0].dtype)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for p in held:
        shards.local(p.grad).mul_(scale)
    return norm


def found_inf(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler will have a fused optimizer skip this step (others it does not call at all)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def grad_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor that a fused optimizer's gradients still carry, where a gradient scaler leaves that to it."""
    return getattr(optimizer, "grad_scale", None)
