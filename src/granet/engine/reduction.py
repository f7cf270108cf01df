"""Which layers of a graph compute at reduced precision: all of them, but for those that lose too much accuracy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from granet.engine.graph import LAYERS, Stages
from granet.engine.precision import CHANNELS, Format
from granet.engine.program import Program, kernel_choices
from granet.engine.quantise import Ranges, formats_of, reduced, relative_error, rounding_layer
from granet.engine.renumber import fill, renumbered
from granet.engine.runtime import build
from granet.engine.steps import Value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reduction:
    """How the values of a graph are represented at reduced precision.

    Attributes:
        precision: "bfloat16" or "int8".
        formats: for each segment, the formats of its steps' results, in order. Empty for bfloat16.
        kept: the names of the layers that stay in float32.
        orders: for each segment, the new numbers of the channels of its steps' results, None where they stay.
        fill: the share of active weights in the stored words, before and after channels were renumbered.
    """

    precision: str
    formats: tuple[tuple[Format, ...], ...] = ()
    kept: tuple[str, ...] = ()
    orders: tuple[tuple[Tensor | None, ...], ...] = ()
    fill: tuple[float, float] = (1.0, 1.0)

    def apply(self, stages: Stages) -> Stages:
        """Returns stages in float32 at this precision."""
        orders = {value: order for value, order in _by_value(stages, self.orders).items() if order is not None}
        return reduced(stages, self.precision, _by_value(stages, self.formats), self.kept, orders)


def _by_value(stages: Stages, rows: Sequence[Sequence[Any]]) -> dict[Value, Any]:
    """Returns what the rows, one for each segment, hold for the results of its steps."""
    return {
        step.out: entry
        for segment, row in zip(stages.segments, rows, strict=False)
        for step, entry in zip(segment.steps, row, strict=True)
    }


def choose_reduction(
    stages: Stages,
    graph: fx.GraphModule,
    cases: Sequence[Sequence[object]],
    precision: str,
    tolerance: float,
    ranges: Ranges | None,
) -> tuple[Reduction, float]:
    """Returns a reduction that keeps the graph's results within a tolerance, and the error that it makes.

    Layers return to float32 in the order of the error that each of them makes alone, until the results are close.

    Args:
        stages: the stages in float32.
        graph: the graph that they came from.
        cases: lists of the graph's arguments.
        precision: "bfloat16" or "int8".
        tolerance: the largest root mean square of the differences allowed, relative to that of the results.
        ranges: what the graph's values were on the calibration data; for int8 only.
    """
    formats = {} if ranges is None else formats_of(stages, ranges)
    rows = tuple(tuple(formats[step.out] for step in segment.steps) for segment in stages.segments) if formats else ()
    expected = [graph(*case) for case in cases]

    def error_of(reduction: Reduction) -> float:
        fast = _unmeasured(reduction.apply(stages))
        return max(relative_error(result, fast(*case)) for result, case in zip(expected, cases, strict=True))

    per_word = CHANNELS[precision]
    numbers = [renumbered(segment, per_word) for segment in stages.segments]
    orders = tuple(
        tuple(found.get(step.out) for step in segment.steps)
        for segment, found in zip(stages.segments, numbers, strict=True)
    )
    together = {value: order for found in numbers for value, order in found.items()}

    def reduction_of(kept: tuple[str, ...]) -> Reduction:
        low = [layer for segment in stages.segments for layer in segment.layers if layer.name not in kept]
        return Reduction(precision, rows, kept, orders, (fill(low, {}, per_word), fill(low, together, per_word)))

    reduction = reduction_of(())
    error = error_of(reduction)
    if error <= tolerance or precision != "int8":
        return reduction, error
    sensitive = _sensitivities(stages, graph, formats, cases[0], expected[0])
    squares = [squared for squared, _ in sensitive]
    count = 1
    while count < len(sensitive) and sum(squares[count:]) > tolerance**2:
        count += 1
    while True:
        kept = tuple(name for _, name in sensitive[:count])
        reduction = reduction_of(kept)
        error = error_of(reduction)
        log.info("%d layers stay in float32: the results differ by %.3f", count, error)
        if error <= tolerance or count == len(sensitive):
            return reduction, error
        count = min(len(sensitive), count + 1 + count // 2)


def _sensitivities(
    stages: Stages, graph: fx.GraphModule, formats: dict, case: Sequence[object], expected: object
) -> list[tuple[float, str]]:
    """Returns the squared error that each layer makes alone, with its name, the largest first."""
    found: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        for layer, node in stages.layers.items():
            if node.target in LAYERS and layer.out in stages.nodes:
                result = rounding_layer(graph, node, formats[layer.inputs[0]], case)
                found[layer.name] = found.get(layer.name, 0.0) + relative_error(expected, result) ** 2
    return sorted(((error, name) for name, error in found.items()), reverse=True)


def _unmeasured(stages: Stages) -> fx.GraphModule:
    """Returns stages as a module, each layer with the first kernel that can compute it."""
    programs = {s: Program(s, lambda layer: kernel_choices(layer, 1)[0], 1) for s in stages.segments}
    return build(stages, programs)
