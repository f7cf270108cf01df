"""Where the time of a compiled network goes: what bounds each layer, and what another pattern would bring."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from granet import topology
from granet.engine.inference import compile as compile_sparse
from granet.engine.report import InferenceReport
from granet.lab.bench.engines import Work, has_bfloat16
from granet.pattern import parse
from granet.text import columns

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SIDE, COPIED = 1024, 1 << 24  # of the matrices that are multiplied, and numbers that are copied, to measure the peaks
HEADINGS = ["layer", "weight", "density", "ms", "of time", "G/s", "bound by", "reached"]


@dataclass(frozen=True)
class Layer:
    """A layer of a compiled network.

    Attributes:
        name: its name.
        shape: that of its weight.
        density: the share of its weights that are not zero.
        kernel: what computes it, as granet's report has it.
        ms: the milliseconds it takes within the network.
        share: these as a share of all layers' milliseconds.
        products: multiply-adds with weights that are not zero, in billions per second.
        bound: whether "arithmetic" or "memory" would take longer at this machine's peaks; empty if that is not known.
        reached: how much of that peak it reaches.
        other_ms: its milliseconds with as many weights in another pattern; None if they were not measured.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    kernel: str
    ms: float
    share: float
    products: float
    bound: str
    reached: float
    other_ms: float | None = None

    @property
    def gain(self) -> float | None:
        """How many times as fast the layer is with the other pattern."""
        return None if self.other_ms is None else self.ms / self.other_ms


@dataclass(frozen=True)
class Layers:
    """The layers of a compiled network. `str()` gives a table, the slowest layer first.

    Attributes:
        precision: what the network computes in.
        peaks: the machine's multiply-adds in billions per second, by dense matrix products, and the gigabytes that
            it reads and writes per second while it copies.
        layers: the layers.
        pattern: the other pattern.
    """

    precision: str
    peaks: tuple[float, float]
    layers: tuple[Layer, ...]
    pattern: str = ""

    def cells(self) -> list[list[str]]:
        """Returns the rows of the table, headings first."""
        rows = [[*HEADINGS, f"{self.pattern} ms", "gain"] if self.pattern else HEADINGS]
        for layer in sorted(self.layers, key=lambda layer: -layer.ms):
            row = [layer.name, "x".join(map(str, layer.shape)), f"{layer.density:.1%}", f"{layer.ms:.3f}"]
            row += [f"{layer.share:.1%}", f"{layer.products:.1f}", layer.bound, f"{layer.reached:.0%}"]
            if not layer.bound:
                row[-1] = ""
            if self.pattern:
                known = layer.other_ms is not None
                row += [f"{layer.other_ms:.3f}", f"{layer.gain:.2f}x"] if known else ["", ""]
            rows.append(row)
        return rows

    @property
    def advice(self) -> str:
        """What would make the network faster, in a sentence; empty if no other pattern was measured."""
        if not self.pattern:
            return ""
        now = sum(layer.ms for layer in self.layers)
        then = sum(layer.ms if layer.other_ms is None else layer.other_ms for layer in self.layers)
        known = [layer for layer in self.layers if layer.gain]
        if then >= now or not known:
            return f"With as many weights in the pattern {self.pattern}, the layers would not be faster."
        best = max(known, key=lambda layer: layer.ms - layer.other_ms)
        return (
            f"With as many weights in the pattern {self.pattern}, the layers would take {then:.2f} instead of "
            f"{now:.2f} ms ({now / then:.2f}x); {best.name} gains most, {best.gain:.2f}x."
        )

    def notes(self) -> list[str]:
        """Returns what is to be said below the table, in sentences."""
        arithmetic, memory = self.peaks
        text = (
            f"G/s are billions of multiply-adds per second with weights that are not zero. This machine does "
            f"{arithmetic:.0f} of them in dense matrix products and copies {memory:.0f} GB/s. A layer is bound by what "
            "would take longer at these peaks: its multiply-adds, or moving its weights, inputs and outputs once. "
            "Those that lie in a cache can be faster than the memory."
        )
        return [text, *filter(None, [self.advice])]

    @property
    def right(self) -> list[int]:
        """The columns of numbers, which are aligned to the right."""
        return [i for i, heading in enumerate(self.cells()[0]) if heading not in ("layer", "weight", "bound by")]

    def __str__(self) -> str:
        return columns(self.cells(), right=self.right)


def measure(work: Work, report: InferenceReport, pattern: str = "") -> Layers:
    """Returns the layers of a network that granet compiled.

    Args:
        work: what was compiled.
        report: the compiled network's report.
        pattern: another pattern, in which the network is compiled once more, with random masks of the same density in
            each layer that it fits; empty for none.
    """
    peaks = arithmetic_peak(report.precision), memory_peak()
    sizes = _sizes(work.model, work.example)
    measured = [row for row in report.layers if row.sparse_ms]
    total = sum(row.sparse_ms for row in measured)
    others = _times_with(pattern, work, report.precision) if pattern else {}
    layers = []
    for row in measured:
        seconds, weights = 1e-3 * row.sparse_ms, row.density * prod(row.shape)
        outputs, moved = sizes.get(row.name, (0, 0))
        # every active weight of a layer is used once for each output of its channel
        products = 1e-9 * weights * outputs / row.shape[0]
        gigabytes = 1e-9 * BYTES[report.precision] * (moved + weights)
        ideal = products / peaks[0], gigabytes / peaks[1]
        known = row.name in sizes
        bound = ("arithmetic" if ideal[0] > ideal[1] else "memory") if known else ""
        reached = max(ideal) / seconds if known else 0.0
        layers.append(
            Layer(row.name, row.shape, row.density, row.chosen, row.sparse_ms, row.sparse_ms / total,
                  products / seconds, bound, reached, others.get(row.name))
        )  # fmt: skip
    return Layers(report.precision, peaks, tuple(layers), pattern)


def _sizes(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, tuple[int, int]]:
    """Returns how many outputs a layer has, and how many inputs and outputs together, by its name."""
    found: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Callable:
        def hook(module, inputs, output):
            outputs, moved = found.get(name, (0, 0))
            found[name] = outputs + output.numel(), moved + inputs[0].numel() + output.numel()

        return hook

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def with_pattern(model: nn.Module, pattern: str) -> nn.Module:
    """Returns a copy with random masks of the pattern: as many weights as before in each layer that it fits.

    The other layers, and those without zeros, stay as they are.
    """
    form, rng = parse(pattern), torch.Generator().manual_seed(0)
    twin = copy.deepcopy(model)
    for name, weight in twin.named_parameters():
        shape, active = tuple(weight.shape), int(weight.count_nonzero())
        if weight.dim() < 2 or active in (0, weight.numel()) or form.misfit(shape) is not None:
            continue
        units = form.shape(shape)
        count = min(max(1, round(active / weight.numel() * prod(units))), prod(units))
        with topology.obeying(form.order):
            mask = topology.random_masks({name: count}, {name: units}, rng)[name]
        mask = form.expanded(mask, shape)
        size = weight.norm() / active**0.5  # the root mean square of the weights stays
        weight.copy_(torch.randn(shape, generator=rng).mul_(mask).mul_(size))
    return twin


def _times_with(pattern: str, work: Work, precision: str) -> Mapping[str, float]:
    """Returns the milliseconds of the layers that have other masks in the pattern, by name."""
    twin = with_pattern(work.model, pattern)
    pairs = zip(work.model.named_parameters(), twin.parameters(), strict=True)
    changed = {name.removesuffix(".weight") for (name, before), after in pairs if not torch.equal(before, after)}
    calibration = {"calibration": work.calibration} if precision == "int8" else {}
    report = compile_sparse(twin, work.example, precision=precision, **calibration).report()
    return {row.name: row.sparse_ms for row in report.layers if row.name in changed and row.sparse_ms}


def _shortest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@cache
def arithmetic_peak(precision: str) -> float:
    """Returns the billions of multiply-adds per second of torch's dense matrix products.

    At reduced precision it is the most of float32, bfloat16 where the processor has it, and int8 for int8: what is not
    fast in torch is computed by wider numbers.
    """
    x = torch.randn(SIDE, SIDE)
    calls = [lambda: x @ x]
    if precision != "float32" and has_bfloat16():
        y = x.bfloat16()
        calls.append(lambda: y @ y)
    if precision == "int8":
        z = x.to(torch.int8)
        calls.append(lambda: torch._int_mm(z, z))
    return max(1e-9 * SIDE**3 / _shortest(call) for call in calls)


@cache
def memory_peak() -> float:
    """Returns the gigabytes per second that are read and written while memory is copied."""
    x = torch.randn(COPIED)
    y = torch.empty_like(x)
    return 1e-9 * 2 * x.nbytes / _shortest(lambda: y.copy_(x))
