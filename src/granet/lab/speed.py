"""The speed of a network on the sparse kernels of this machine, beside dense: a run's network, or a model by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet import topology
from granet.distribution import named
from granet.engine.inference import InferenceReport, compile
from granet.engine.timing import Spread, time_in_turns
from granet.engine.training import TrainingReport, accelerate
from granet.methods.fixed import Fixed
from granet.sparsifier import Sparsifier
from granet.train.models import MODELS, build
from granet.train.run import Run, load_weights
from granet.train.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """The times of a training step, dense and accelerated. `str()` gives the plans and a table of the steps.

    Attributes:
        plans: what was chosen for each layer, by the precision and memory format that it was measured in.
        steps: the times of a whole step (forward, backward, optimizer), by what ran.
    """

    plans: dict[str, TrainingReport]
    steps: dict[str, Spread]

    @property
    def dense_ms(self) -> float:
        """The shortest step without granet's kernels, of all precisions and formats."""
        return min(spread.least for name, spread in self.steps.items() if name.startswith("dense"))

    @property
    def fast_ms(self) -> float:
        """The shortest step with granet's plan, of all precisions and formats."""
        return min(spread.least for name, spread in self.steps.items() if name.startswith("granet"))

    def __str__(self) -> str:
        lines = [f"{plan}\n" for plan in self.plans.values()]
        lines.append(f"{'training step':<44} {'least ms':>9} {'median ms':>10}")
        lines += [f"{name:<44} {spread.least:>9.2f} {spread.median:>10.2f}" for name, spread in self.steps.items()]
        lines.append(f"the fastest with granet against the fastest dense: {self.dense_ms / self.fast_ms:.2f}x")
        return "\n".join(lines)


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
    """Returns the times of a training step with the model's present zeros as a fixed topology.

    Dense and accelerated steps take turns, in float32 and under bfloat16 autocast, contiguous and channels_last.

    Raises:
        ArithmeticError: the loss of an accelerated step is not that of the dense one.
    """
    contiguous, last, plans = torch.contiguous_format, torch.channels_last, {}
    settings = [(None, contiguous), (torch.bfloat16, contiguous)]
    if example_inputs.dim() == 4:
        settings += [(None, last), (torch.bfloat16, last)]

    def step_of(fast: bool, autocast: torch.dtype | None, memory_format: torch.memory_format) -> Callable[[], float]:
        twin = copy.deepcopy(model).train()
        inputs = example_inputs
        if inputs.dim() == 4:
            twin, inputs = twin.to(memory_format=memory_format), inputs.to(memory_format=memory_format)
        sparsifier = Sparsifier(twin, Fixed())
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9)
        sparsifier.attach(optimizer)
        rounded = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast is not None)
        with torch.no_grad(), rounded():
            classes = copy.deepcopy(twin)(inputs).shape[1]
        if fast:
            with rounded():
                plan = accelerate(sparsifier, inputs).report()
            plans[plan.setting] = plan
        target = torch.arange(len(inputs)) % classes

        def step() -> float:
            optimizer.zero_grad()
            with rounded():
                loss = F.cross_entropy(twin(inputs), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    calls, losses = {}, {}
    for autocast, memory_format in settings:
        precision = "bfloat16 autocast" if autocast else "float32"
        form = "channels_last" if memory_format is last else "contiguous"
        for kind in ("dense", "granet"):
            name = f"{kind}, {precision}, {form}"
            calls[name] = step_of(kind == "granet", autocast, memory_format)
            losses[name] = calls[name]()
        if abs(losses[name] - losses[f"dense, {precision}, {form}"]) > (0.05 if autocast else 1e-3) * abs(losses[name]):
            raise ArithmeticError(f"the losses of the first step differ: {losses}")
    spreads = time_in_turns(list(calls.values()), repeats=repeats)
    return StepReport(plans, dict(zip(calls, spreads, strict=True)))


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
