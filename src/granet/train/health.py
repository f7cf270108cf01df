"""Warnings about a training that does not learn, or is needlessly slow.

A loss that stays at chance, layers whose outputs are all the same, bfloat16 without the arithmetic for it.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

PATIENCE = 0.2  # the share of the training after which a network should be better than chance
LEARNT = 0.98  # a loss above this share of log(classes) is one of chance
IMAGES = 32  # at which a layer is looked
ADVICE = (
    "a lower train.lr (now {lr:g}), a longer train.warmup, train.clip_norm, a lower method.sparsity (the network is at "
    "{sparsity:.1%}), another distribution, or model.keep_dense for the sparsest layers"
)


def slow_bf16(device: torch.device) -> bool:
    """Returns whether bfloat16 is computed in software there, many times slower than float32.

    On a processor, torch's convolutions have kernels for it where oneDNN knows its arithmetic; elsewhere they are plain
    loops.
    """
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    return device.type == "cpu" and not known()


@dataclass
class Health:
    """What was warned of so far: each kind of trouble is named once."""

    at_chance: bool = False
    dead: bool = False

    def check(self, trainer, loss: float) -> None:
        """Warns if the validation loss stays at chance, or a layer of the network has died.

        A layer is dead if all images give it the same outputs: nothing of the image reaches the layers behind it.
        """
        advice = ADVICE.format(lr=trainer.settings.lr, sparsity=trainer.sparsifier.sparsity)
        late, chance = trainer.step >= PATIENCE * trainer.steps, math.log(trainer.dataset.classes)
        if late and not self.at_chance and not loss < LEARNT * chance:
            self.at_chance = True
            logger.warning(
                f"the validation loss is {loss:.3f} at step {trainer.step:,} of {trainer.steps:,}, no better than "
                f"guessing among {trainer.dataset.classes} classes ({chance:.3f}). Try {advice}"
            )
        if self.dead or not trainer.ranks.first:
            return
        images = next(iter(trainer.images.spread("validation", IMAGES)))[0].to(memory_format=trainer.layout)
        name = first_dead_layer(trainer.model, images)
        if name is not None:
            self.dead = True
            logger.warning(
                f"{name!r} is dead at step {trainer.step:,}: its outputs are the same for each of {len(images)} "
                f"images, and nothing of the image reaches what lies behind it. Try {advice}"
            )


@torch.no_grad()
def first_dead_layer(model: nn.Module, images: Tensor) -> str | None:
    """Returns the name of the first module without children whose inputs differ and whose outputs do not, or None.

    A copy of the model is evaluated, so that nothing of it is touched: kernels, hooks, or what was compiled.
    """
    twin, dead = copy.deepcopy(model).eval(), []

    def hook(name: str):
        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            if inputs and not _same(inputs[0]) and _same(output):
                dead.append(name)

        return look

    for name, module in twin.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(hook(name))
    twin(images)
    return dead[0] if dead else None


def _same(values: object) -> bool:
    """Returns whether the values of a batch are the same for every image."""
    return isinstance(values, Tensor) and values.dim() > 1 and bool((values == values[:1]).all())
