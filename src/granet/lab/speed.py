"""The speed of a network on the sparse kernels of this machine, beside dense: a run's network, or a model by name."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet import topology
from granet.distribution import named
from granet.engine.calibration import PIECES
from granet.engine.inference import InferenceReport, compile
from granet.engine.timing import Spread, time_in_turns
from granet.engine.training import TrainingReport, accelerate
from granet.methods.fixed import Fixed
from granet.sparsifier import Sparsifier
from granet.text import si
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


@dataclass(frozen=True)
class InferenceBench:
    """A compiled model's report, with its accuracy if the network comes from a run. `str()` gives both.

    Attributes:
        report: what `granet.compile` measured.
        images: the number of test images, 0 for a model without data.
        dense_accuracy: the share of them that the dense network classifies correctly.
        fast_accuracy: the same of the compiled one.
    """

    report: InferenceReport
    images: int = 0
    dense_accuracy: float = 0.0
    fast_accuracy: float = 0.0

    def __str__(self) -> str:
        lines = [str(self.report)]
        dense = 4 * sum(math.prod(row.shape) for row in self.report.layers)
        if self.report.nbytes:
            lines.append(f"weights: dense float32 {si(dense)}B, packed {si(self.report.nbytes)}B")
        if self.images:
            lines.append(
                f"accuracy on {self.images:,} test images: dense float32 {self.dense_accuracy:.2%}, "
                f"compiled ({self.report.chosen}, {self.report.precision}) {self.fast_accuracy:.2%}"
            )
        return "\n".join(lines)


def network(
    source: str, *, sparsity: float, distribution: str = "erk", size: int = 32, checkpoint: str | None = "last"
) -> tuple[nn.Module, tuple, Trainer | None]:
    """Returns the network of a run directory, or a random sparse one of a named model, and the shape of its input.

    The last result is the run's trainer, with its data, or None.

    Args:
        source: a run directory or a name in `granet.train.models.MODELS`.
        sparsity: sparsity of a named model; the network of a run keeps its own.
        distribution: how a named model's sparsity is distributed.
        size: height and width of a named model's input.
        checkpoint: that of the run: `"last"`, `"best"`, or None for the best if there is one.

    Raises:
        ValueError: `source` is neither.
    """
    path = Path(source)
    if (path / "recipe.yaml").exists() or (source not in MODELS and (path.exists() or len(path.parts) > 1)):
        run = Run.open(path)
        trainer = Trainer(run.recipe, begins=False)
        load_weights(run, trainer, checkpoint)
        trainer.sparsifier.fold()
        trainer.quantisation.remove()
        return trainer.model.cpu().float(), tuple(trainer.dataset.shape), trainer
    model = build(source, classes=10, in_channels=3)
    sparse = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    shapes = {name: tuple(parameter.shape) for name, parameter in sparse.items()}
    counts = named(distribution)(shapes, 1 - sparsity)
    masks = topology.random_masks(counts, shapes, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in sparse.items():
            parameter.mul_(masks[name])
    return model, (3, size, size), None


def bench_inference(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    precision: str = "float32",
    trainer: Trainer | None = None,
    save_compiled: Path | None = None,
) -> InferenceBench:
    """Returns what `granet.compile` measures for every layer and for the whole model, dense and compiled.

    With a trainer, int8 is calibrated on its training images, and the accuracy is that on its test images. Without one
    int8 is calibrated on random images, which does for measuring time.
    """
    model, batch = copy.deepcopy(model).eval(), len(example_inputs)
    calibration = None
    if precision == "int8":
        wanted = PIECES * batch
        calibration = [torch.randn(wanted, *example_inputs.shape[1:])] if trainer is None else []
        for x, _ in () if trainer is None else trainer.images.once("train"):
            calibration.append(x.cpu())
            if sum(map(len, calibration)) >= wanted:
                break
        calibration = torch.cat(calibration)[:wanted]
        example_inputs = calibration[:batch]
    fast = compile(model, example_inputs, precision=precision, calibration=calibration)
    if save_compiled is not None:
        fast.save(save_compiled)
    if trainer is None:
        return InferenceBench(fast.report())
    correct, images = torch.zeros(2), 0
    with torch.no_grad():
        for x, y in trainer.images.once("test"):
            for piece, labels in zip(x.cpu().split(batch), y.cpu().split(batch), strict=True):
                if len(piece) == batch:
                    for i, one in enumerate((model, fast)):
                        correct[i] += (one(piece).argmax(dim=1) == labels).sum()
                    images += batch
    dense, compiled = (correct / max(1, images)).tolist()
    return InferenceBench(fast.report(), images, dense, compiled)


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
    precision: str = "float32",
    save_compiled: Path | None = None,
) -> InferenceBench | StepReport:
    """Returns the report to print for a run directory or a named model.

    Args:
        source: a run directory or the name of a model.
        training: measure a training step instead of inference.
        batch: number of images at a time.
        sparsity: sparsity of a named model.
        distribution: how a named model's sparsity is distributed.
        size: height and width of a named model's input.
        precision: precision of the compiled network, "float32", "bfloat16" or "int8".
        save_compiled: the file to which the compiled network is saved, if any.
    """
    if save_compiled is not None and (training or not save_compiled.absolute().parent.is_dir()):
        why = "training is measured, not inference" if training else "there is no such folder"
        raise ValueError(f"the compiled network cannot be saved to {save_compiled}: {why}")
    if training and precision != "float32":
        raise ValueError("precision is for inference: a training step is measured in float32 and in bfloat16 anyway")
    if batch < 1 or size < 1:
        raise ValueError(f"batch={batch}, size={size}: both must be at least 1")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1: it is the share of inactive weights")
    model, shape, trainer = network(source, sparsity=sparsity, distribution=distribution, size=size)
    images = torch.randn(batch, *shape)
    if training:
        return bench_training(model, images)
    return bench_inference(model, images, precision=precision, trainer=trainer, save_compiled=save_compiled)
