"""The speed of a network on the sparse kernels of this machine, beside dense: a run's network, or a model by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet import topology
from granet.distribution import named
from granet.engine.inference import InferenceReport, compile
from granet.engine.timing import interleaved
from granet.engine.training import TrainingReport, accelerate
from granet.methods.fixed import Fixed
from granet.sparsifier import Sparsifier
from granet.train.models import MODELS, build
from granet.train.run import Run, load_weights
from granet.train.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """A training step with the engine and without; str() is a table and the two times.

    Attributes:
        plan: what was chosen for each layer.
        dense_ms: a whole step (forward, backward, optimizer) on torch's kernels, in milliseconds.
        fast_ms: the same with the engine.
    """

    plan: TrainingReport
    dense_ms: float
    fast_ms: float

    def __str__(self) -> str:
        ratio = self.dense_ms / self.fast_ms
        return f"{self.plan}\ntraining step: dense {self.dense_ms:.2f} ms, fast {self.fast_ms:.2f} ms ({ratio:.2f}x)"


def network(source: str, *, sparsity: float, distribution: str = "erk", size: int = 32) -> tuple[nn.Module, tuple]:
    """Returns the network of a run directory, or a random sparse one of a named model, and the shape of its input.

    Args:
        source: a run directory or a name in `granet.train.models.MODELS`.
        sparsity: sparsity of a named model; the network of a run keeps its own.
        distribution: how a named model's sparsity is distributed.
        size: height and width of a named model's input.

    Raises:
        ValueError: `source` is neither.
    """
    path = Path(source)
    if (path / "recipe.yaml").exists() or (source not in MODELS and (path.exists() or len(path.parts) > 1)):
        run = Run.open(path)
        trainer = Trainer(run.recipe, begins=False)
        load_weights(run, trainer, "last")
        trainer.sparsifier.fold()
        return trainer.model.cpu().float(), tuple(trainer.dataset.shape)
    model = build(source, classes=10, in_channels=3)
    sparse = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    shapes = {name: tuple(parameter.shape) for name, parameter in sparse.items()}
    counts = named(distribution)(shapes, 1 - sparsity)
    masks = topology.random_masks(counts, shapes, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in sparse.items():
            parameter.mul_(masks[name])
    return model, (3, size, size)


def bench_inference(model: nn.Module, example_inputs: Tensor) -> InferenceReport:
    """Returns what `granet.compile` measures for every layer and for the whole model, dense and compiled."""
    return compile(copy.deepcopy(model).eval(), example_inputs).report()


def bench_training(model: nn.Module, example_inputs: Tensor, *, repeats: int = 5) -> StepReport:
    """Returns the times of a training step, dense and accelerated; the zeros of the model are a fixed topology."""

    plans = []

    def step_of(fast: bool) -> Callable[[], None]:
        twin = copy.deepcopy(model).train()
        sparsifier = Sparsifier(twin, Fixed())
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9)
        sparsifier.attach(optimizer)
        if fast:
            plans.append(accelerate(sparsifier, example_inputs))
        with torch.no_grad():
            classes = twin(example_inputs).shape[1]
        target = torch.arange(len(example_inputs)) % classes

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(twin(example_inputs), target).backward()
            optimizer.step()

        return step

    dense_ms, fast_ms = interleaved([step_of(False), step_of(True)], repeats=repeats)
    return StepReport(plans[0].report(), dense_ms, fast_ms)


def main(
    source: str,
    *,
    training: bool = False,
    batch: int = 1,
    sparsity: float = 0.9,
    distribution: str = "erk",
    size: int = 32,
) -> InferenceReport | StepReport:
    """Returns the report to print for a run directory or a named model.

    Args:
        source: a run directory or the name of a model.
        training: measure a training step instead of inference.
        batch: number of images at a time.
        sparsity: sparsity of a named model.
        distribution: how a named model's sparsity is distributed.
        size: height and width of a named model's input.
    """
    if batch < 1 or size < 1:
        raise ValueError(f"batch={batch}, size={size}: both must be at least 1")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1: it is the share of inactive weights")
    model, shape = network(source, sparsity=sparsity, distribution=distribution, size=size)
    images = torch.randn(batch, *shape)
    return bench_training(model, images) if training else bench_inference(model, images)
