"""Measuring, then choosing: which kernel runs a layer, and whether the sparse model is worth running at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from granet.engine import ops
from granet.engine.graph import Stages, tensors_of
from granet.engine.program import Choice, Layer, Program, Segment, choices

NOISE = 0.03  # a win must exceed this share of the time, the scatter of repeated minima on a quiet machine


@dataclass(frozen=True)
class Plan:
    """A compiled model: its stages and the program of each segment."""

    stages: Stages
    programs: dict[Segment, Program]


def milliseconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """The shortest timing of `call` in milliseconds; see `interleaved`."""
    return interleaved([call], repeats=repeats)[0]


def interleaved(calls: Sequence[Callable[[], object]], *, repeats: int = 5, enough: float = 0.05) -> list[float]:
    """The shortest timing of each call in milliseconds, the calls taking turns so that noise hits all alike.

    There are `repeats` rounds after one unmeasured, and more while they have taken less than `enough` seconds together:
    a short call is more easily disturbed.
    """
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats or (time.perf_counter() - begin < enough and rounds < 10 * repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return [b * 1e3 for b in best]


def plan_inference(
    model: nn.Module,
    traced: fx.GraphModule,
    inputs: Sequence[Tensor],
    tolerance: float,
    lower: Callable[..., Stages],
    execute: Callable[..., object],
) -> tuple[Plan | None, object]:
    """The fastest plan found for `model` on `inputs` (None where dense wins) and its report."""
    from granet.engine.inference import InferenceReport

    stages = lower(traced)
    programs, sparse_ms = {}, {}
    feeds = _feeds(stages, inputs, execute)
    for segment in stages.segments:
        programs[segment], spent = _fastest(segment, feeds[segment])
        sparse_ms.update(spent)
    plan = Plan(stages, programs)
    arenas: dict[Segment, list[Tensor]] = {}
    expected, found = model(*inputs), execute(stages, programs, inputs, arenas)
    error = _difference(expected, found)
    if not error <= tolerance:
        raise RuntimeError(
            f"the compiled model's output differs from the dense model's by {error:.2e} of its largest value, "
            f"more than the tolerance of {tolerance:.0e}"
        )
    known: dict[tuple, float] = {}
    dense_ms = {layer: _dense_ms(layer, known) for segment in stages.segments for layer in segment.layers}
    whole = [lambda: model(*inputs), lambda: execute(stages, programs, inputs, arenas)]
    dense_total, fast_total = interleaved(whole, repeats=9)
    wins = fast_total < dense_total * (1 - NOISE)
    rows = _rows(stages, programs, dense_ms, sparse_ms)
    report = InferenceReport(
        layers=tuple(rows),
        dense_ms=dense_total,
        fast_ms=fast_total if wins else dense_total,
        chosen="sparse" if wins else "dense",
        why="faster as a whole" if wins else f"the compiled model took {fast_total:.2f} ms, no less than dense",
        error=error,
        nbytes=sum(p.nbytes for p in programs.values()) if wins else 0,
        arena_nbytes=sum(4 * p.arena_floats for p in programs.values()) if wins else 0,
    )
    return (plan if wins else None), report


def _feeds(stages: Stages, inputs: Sequence[Tensor], execute: Callable[..., object]) -> dict[Segment, list[Tensor]]:
    """Inputs of the right shape for each segment; a layer's speed does not depend on what they hold."""
    feeds = {}
    for segment in stages.segments:
        steps = [s for s in segment.steps if not s.inputs]
        feeds[segment] = [torch.randn(s.out.shape) for s in steps]
    return feeds


def _batches(segment: Segment) -> list[int]:
    """How many images to lay innermost, the candidates worth measuring."""
    width = ops.cpu()[0]
    if segment.images == 1:
        return [1]
    if all(step.out.size == (1, 1) for step in segment.steps):
        share = -(-segment.images // torch.get_num_threads())
        return [min(-(-share // width), 8) * width]
    return [1, width] if 2 * segment.images >= width else [1]


def _fastest(segment: Segment, inputs: list[Tensor]) -> tuple[Program, dict[Layer, tuple[float, str]]]:
    """The fastest program found for a segment, and milliseconds and kernel of each of its layers."""
    best: tuple[float, Program, dict] | None = None
    for batch in _batches(segment):
        options = {layer: choices(layer, batch) for layer in segment.layers}
        spent: dict[Layer, dict[Choice, float]] = {layer: {} for layer in options}
        for i in range(max((len(o) for o in options.values()), default=1)):
            picked = {layer: o[min(i, len(o) - 1)] for layer, o in options.items()}
            program = Program(segment, picked.__getitem__, batch)
            steps = _step_times(program, inputs)
            for layer, choice in picked.items():
                cost = sum(steps[s] for s in program.layer_steps[layer])
                spent[layer][choice] = min(cost, spent[layer].get(choice, float("inf")))
        picked = {layer: min(costs, key=costs.get) for layer, costs in spent.items()}
        program = Program(segment, picked.__getitem__, batch)
        arena = program.arena()
        total = milliseconds(lambda p=program, a=arena: p.run(inputs, a), repeats=5)
        costs = {layer: (spent[layer][choice], choice.kind) for layer, choice in picked.items()}
        if best is None or total < best[0]:
            best = (total, program, costs)
    return best[1], best[2]


def _step_times(program: Program, inputs: list[Tensor], repeats: int = 5) -> list[float]:
    """The shortest time of each step of a program, in milliseconds, measured in place, as the whole runs."""
    arena = program.arena()
    runs = [program.run(inputs, arena, time=True)[-1] for _ in range(repeats + 1)]
    return (torch.stack(runs[1:]).min(dim=0).values.double() * 1e-6).tolist()


def _dense_ms(layer: Layer, known: dict[tuple, float]) -> float:
    """Milliseconds torch's dense kernel takes for a layer, with bias and nothing else fused; `known` by shape."""
    source, spec = layer.inputs[0], layer.spec
    key = (spec, source.images, source.size)
    if key not in known:
        if source.size == (1, 1) and spec.kernel == (1, 1) and spec.groups == 1:
            x, weight = torch.randn(source.images, source.channels), layer.weight.flatten(1)
            known[key] = milliseconds(lambda: F.linear(x, weight, layer.bias))
        else:
            x = torch.randn(source.images, source.channels, *source.size)
            arguments = (layer.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
            known[key] = milliseconds(lambda: F.conv2d(x, layer.weight, *arguments), repeats=3)
    return known[key]


def _rows(
    stages: Stages,
    programs: dict[Segment, Program],
    dense_ms: dict[Layer, float],
    sparse_ms: dict[Layer, tuple[float, str]],
) -> list[object]:
    from granet.engine.inference import LayerReport

    rows = []
    for segment in stages.segments:
        for layer in segment.layers:
            spent, kind = sparse_ms[layer]
            why = "faster" if spent < dense_ms[layer] else "kept in the kernels' layout, where leaving it costs more"
            rows.append(
                LayerReport(layer.name, tuple(layer.weight.shape), layer.density, dense_ms[layer], spent, kind, why)
            )
    modules = dict(stages.graph.named_modules())
    for item in stages.order:
        if isinstance(item, fx.Node) and item.op == "call_module":
            module = modules[item.target]
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                density = module.weight.count_nonzero().item() / module.weight.numel()
                shape = tuple(module.weight.shape)
                rows.append(LayerReport(str(item.target), shape, density, None, None, "dense", "not supported"))
    return rows


def _difference(expected: object, found: object) -> float:
    """The largest difference between two nests of tensors, relative to the largest expected value."""
    worst = 0.0
    for a, b in zip(tensors_of([expected]), tensors_of([found]), strict=True):
        if a.numel():
            worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item())
    return worst
