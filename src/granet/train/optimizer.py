"""The optimizer, the learning rate and the moving average that a recipe asks for."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from granet.train.catalog import OPTIMIZERS
from granet.train.recipe import Train


def learning_rate(settings: Train, step: int, steps: int) -> float:
    """Returns the learning rate of the optimizer step after `step` steps of `steps`; step counts are resolved.

    >>> settings = Train(lr=1.0, warmup=2, milestones=(5, 8), gamma=0.5)
    >>> [learning_rate(settings, step, 10) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    """
    steps = next((stage for stage in settings.stages if step < stage), steps)
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    match settings.schedule:
        case "multistep":
            return settings.lr * settings.gamma ** sum(step >= milestone for milestone in settings.milestones)
        case "cosine":
            progress = (step - settings.warmup) / max(steps - settings.warmup, 1)
            return settings.lr * (1 + math.cos(math.pi * progress)) / 2
    return settings.lr


def build(model: nn.Module, settings: Train, *, spared: Iterable[str] = ()) -> torch.optim.Optimizer:
    """Returns the optimizer of the settings; with `decay: weights` vectors (biases, norms) are not decayed.

    Args:
        model: its parameters are optimized.
        settings: the section `train` of a recipe.
        spared: names of more parameters that are not decayed.
    """
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2 and not name.endswith("values")}
    free = (vectors if settings.decay == "weights" else set()) | set(spared)
    decayed = [p for name, p in model.named_parameters() if name not in free]
    spared = [p for name, p in model.named_parameters() if name in free]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return OPTIMIZERS[settings.optimizer].build(groups, settings)


def sgd(groups: list[dict], settings: Train) -> torch.optim.Optimizer:
    """Returns SGD over the parameter groups."""
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)


def adamw(groups: list[dict], settings: Train) -> torch.optim.Optimizer:
    """Returns AdamW over the parameter groups; `momentum` is its first beta."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999))


@torch.no_grad()
def average_(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Takes the weights of `model` after `step` steps into their exponential moving average; buffers are copied.

    The first steps weigh more than `decay` says, or the random initial weights would stay in the average for long.
    """
    update = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    update(list(average.parameters()), list(model.parameters()), None)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
