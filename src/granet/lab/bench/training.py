"""A training step, dense and accelerated, in turns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.engine.timing import Spread, time_in_turns
from granet.engine.training import TrainingReport, accelerate
from granet.methods.fixed import Fixed
from granet.sparsifier import Sparsifier


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


def training_step(model: nn.Module, example_inputs: Tensor, *, repeats: int = 5) -> StepReport:
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
