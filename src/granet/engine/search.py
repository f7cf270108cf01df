"""Choice, by measurement, of the kernel and layout of every layer, and between the sparse and the dense model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from granet.engine import ops
from granet.engine.graph import LAYERS, Stages, shape_of, tensors_of
from granet.engine.precision import FLOAT32
from granet.engine.program import KernelChoice, Program, kernel_choices
from granet.engine.quantise import relative_error
from granet.engine.reduction import Reduction
from granet.engine.report import InferenceReport, LayerReport
from granet.engine.runtime import build
from granet.engine.steps import Convolution, Segment
from granet.engine.timing import Spread, interleaved, milliseconds, time_in_turns

log = logging.getLogger(__name__)

ROUNDS = 4  # timings of each step with each kernel, of which the shortest counts


@dataclass(frozen=True)
class Decision:
    """How the segments of a graph are computed. It does not hold the weights.

    Attributes:
        segments: for each segment the number of innermost images, whether 1x1 convolutions are chained, and kernels.
        report: what was measured.
    """

    segments: tuple[tuple[int, bool, tuple[KernelChoice, ...]], ...]
    report: InferenceReport
    reduction: Reduction | None = None

    def reduced(self, stages: Stages) -> Stages:
        """Returns stages in float32 at the precision that was decided on."""
        return stages if self.reduction is None else self.reduction.apply(stages)

    def programs(self, stages: Stages) -> dict[Segment, Program]:
        """Returns the programs of the segments of `reduced` stages, packed with the current weights."""
        programs = {}
        for segment, (batch, chain, kinds) in zip(stages.segments, self.segments, strict=True):
            picked = dict(zip(segment.layers, kinds, strict=True))
            programs[segment] = Program(segment, picked.__getitem__, batch, chain=chain)
        return programs


def search(
    stages: Stages,
    dense: Callable[..., object],
    cases: Sequence[Sequence[object]],
    tolerance: float,
    names: dict[fx.Node, str],
    reduction: Reduction | None = None,
) -> tuple[Decision, fx.GraphModule | None]:
    """Returns the decision for `stages` and the module that follows it (None if the dense model is to run).

    Args:
        stages: the stages in float32.
        dense: computes the same with torch's kernels, from the same arguments.
        cases: lists of arguments. The outputs are compared on all of them, and times are measured on the first.
        tolerance: the largest allowed difference of the outputs, relative to the largest value.
        names: the name of each parameter, by its placeholder.
        reduction: how the values are represented at reduced precision; None for float32.
    """
    stages = stages if reduction is None else reduction.apply(stages)
    programs: dict[Segment, Program] = {}
    spent: dict[Convolution, tuple[float, str]] = {}
    segments = []
    for i, segment in enumerate(stages.segments):
        log.info("measuring the kernels of %d layers (part %d)", len(segment.layers), i + 1)
        programs[segment], costs, settings = fastest_program(segment)
        spent.update(costs)
        segments.append(settings)
    fast = build(stages, programs)
    error = max(compare(dense, fast, case, reduction) for case in cases)
    log.info("measuring the dense layers and the compiled model")
    known: dict[tuple, float] = {}
    dense_ms = {layer: _dense_ms(layer, known) for segment in stages.segments for layer in segment.layers}
    calls = [lambda: dense(*cases[0]), lambda: fast(*cases[0])]
    with torch.random.fork_rng(devices=[]):
        dense_times, fast_times = time_in_turns(calls, repeats=3, enough=0.5)
    packed = sum(p.nbytes for p in programs.values()), sum(4 * p.arena_floats for p in programs.values())
    rows = _rows(stages, dense_ms, spent, names, reduction is not None)
    precision = "float32" if reduction is None else reduction.precision
    report = verdict(rows, dense_times, fast_times, error, packed, tolerance, precision)
    if reduction is not None and report.chosen == "sparse":
        report = replace(report, fill=reduction.fill)
    return Decision(tuple(segments), report, reduction), fast if report.chosen == "sparse" else None


def compare(
    dense: Callable[..., object],
    fast: Callable[..., object],
    args: Sequence[object],
    reduction: Reduction | None = None,
) -> float:
    """Returns the difference of two functions' outputs for the same arguments and the same random state.

    It is the largest one, relative to the largest value; at reduced precision it is the root mean square.
    """
    outputs = []
    for call in (dense, fast):
        with torch.random.fork_rng(devices=[]):
            outputs.append(call(*args))
    return difference(*outputs) if reduction is None else relative_error(*outputs)


def verdict(
    rows: Sequence[LayerReport],
    dense: Spread,
    fast: Spread,
    error: float,
    packed: tuple[int, int],
    tolerance: float,
    precision: str = "float32",
) -> InferenceReport:
    """Returns the report of a graph: sparse if that is faster and computes the same, else dense."""
    wins = fast.is_faster_than(dense) and error <= tolerance
    why = "faster as a whole" if wins else not_faster(dense, fast)
    if not error <= tolerance:
        measure = "the largest value" if precision == "float32" else "their root mean square"
        why = f"the outputs differ by {error:.1e} of {measure}, more than the tolerance of {tolerance:.0e}"
        log.warning("not compiled: %s", why)
    return InferenceReport(
        layers=tuple(rows),
        dense_ms=dense.least,
        fast_ms=fast.least if wins else dense.least,
        chosen="sparse" if wins else "dense",
        why=why,
        error=error,
        nbytes=packed[0] if wins else 0,
        arena_nbytes=packed[1] if wins else 0,
        precision=precision if wins else "float32",
    )


def not_faster(dense: Spread, fast: Spread) -> str:
    """Returns the reason why the dense model runs."""
    return f"the compiled model is not faster: it took {fast}, the dense one {dense}"


def difference(expected: object, found: object) -> float:
    """Returns the largest difference between two nests of tensors, relative to the largest finite expected value.

    The difference is infinite if shapes or types differ, if an infinity or NaN is not in the same place, or if integers
    or bools differ.
    """
    worst = 0.0
    for a, b in zip(tensors_of([expected]), tensors_of([found]), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        apart = ~((a == b) | ((a != a) & (b != b)))
        if apart.any():
            if not (a.is_floating_point() or a.is_complex()):
                return float("inf")
            scale = a[a.isfinite()].abs().max().clamp_min(1e-30) if a.isfinite().any() else 1.0
            gap = ((a - b).abs()[apart] / scale).max().item()
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def _batches(segment: Segment) -> list[int]:
    """Returns the numbers of innermost images that are worth measuring."""
    width = ops.cpu()[0]
    if segment.images == 1:
        return [1]
    if all(step.out.size == (1, 1) for step in segment.steps):
        share = -(-segment.images // torch.get_num_threads())
        return [min(-(-share // width), 8) * width]
    return [1, width] if 2 * segment.images >= width else [1]


def fastest_program(
    segment: Segment, chains: tuple[bool, ...] = (True, False)
) -> tuple[Program, dict[Convolution, tuple[float, str]], tuple[int, bool, tuple[KernelChoice, ...]]]:
    """Returns a segment's fastest program, the milliseconds and kernel of each layer, and the program's settings."""
    # Random inputs will do: a layer's speed does not depend on their values.
    inputs = [torch.randn(s.out.shape, dtype=torch.float32) for s in segment.steps if not s.inputs]
    best: tuple[float, Program, dict, tuple] | None = None
    for batch in _batches(segment):
        options = {layer: kernel_choices(layer, batch) for layer in segment.layers}
        spent: dict[Convolution, dict[KernelChoice, float]] = {layer: {} for layer in options}
        kept: dict = {}
        for i in range(max((len(o) for o in options.values()), default=1)):
            picked = {layer: o[min(i, len(o) - 1)] for layer, o in options.items()}
            program = Program(segment, picked.__getitem__, batch, chain=False, kept=kept)
            steps = step_times(program, inputs)
            for layer, choice in picked.items():
                cost = sum(steps[s] for s in program.layer_steps[layer])
                spent[layer][choice] = min(cost, spent[layer].get(choice, float("inf")))
        picked = {layer: min(costs, key=costs.get) for layer, costs in spent.items()}
        programs = [Program(segment, picked.__getitem__, batch, chain=chain, kept=kept) for chain in chains]
        arenas = [program.arena() for program in programs]
        calls = [lambda p=p, a=a: p.run(inputs, a) for p, a in zip(programs, arenas, strict=True)]
        totals = interleaved(calls, repeats=2, enough=0.2)
        costs = {layer: (spent[layer][choice], choice.kind) for layer, choice in picked.items()}
        for total, program, chain in zip(totals, programs, chains, strict=True):
            if best is None or total < best[0]:
                best = (total, program, costs, (batch, chain, tuple(picked[layer] for layer in segment.layers)))
    return best[1], best[2], best[3]


def step_times(program: Program, inputs: list[Tensor]) -> list[float]:
    """Returns the shortest time of each step in milliseconds, measured while the whole program runs."""
    arena = program.arena()
    runs = [program.run(inputs, arena, time=True)[-1] for _ in range(ROUNDS + 1)]
    return (torch.stack(runs[1:]).min(dim=0).values.double() * 1e-6).tolist()


def _dense_ms(layer: Convolution, known: dict[tuple, float]) -> float:
    """Returns the milliseconds of torch's dense kernel for a layer with its bias. `known` keeps times by shape."""
    source, spec = layer.inputs[0], layer.spec
    key = (spec, source.images, source.size)
    if key not in known:
        if source.size == (1, 1) and spec.kernel == (1, 1) and spec.groups == 1:
            x, weight = torch.randn(source.images, source.channels, dtype=torch.float32), layer.weight.flatten(1)
            known[key] = milliseconds(lambda: F.linear(x, weight, layer.bias), repeats=3)
        else:
            x = torch.randn(source.images, source.channels, *source.size, dtype=torch.float32)
            arguments = (layer.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
            known[key] = milliseconds(lambda: F.conv2d(x, layer.weight, *arguments), repeats=2)
    return known[key]


def _rows(
    stages: Stages,
    dense_ms: dict[Convolution, float],
    spent: dict[Convolution, tuple[float, str]],
    names: dict[fx.Node, str],
    reduced: bool,
) -> list[LayerReport]:
    rows = []
    for layer, (sparse_ms, kind) in spent.items():
        why = "faster" if sparse_ms < dense_ms[layer] else "kept in the kernels' layout, because leaving it costs more"
        shape, form = tuple(layer.weight.shape), layer.inputs[0].format
        kind = form.precision if kind == "words" else kind
        if form == FLOAT32 and reduced:
            why = "kept in float32, because bytes lose too much accuracy"
        rows.append(LayerReport(layer.name, shape, layer.density, dense_ms[layer], sparse_ms, kind, why))
    for item in stages.order:
        if isinstance(item, fx.Node) and item.target in LAYERS:
            weight = next((n for n in item.all_input_nodes if n in names and len(shape_of(n)) > 1), item)
            name = names.get(weight, item.name).removesuffix(".weight")
            rows.append(LayerReport(name, shape_of(weight), 1.0, None, None, "dense", "not supported"))
    return rows
