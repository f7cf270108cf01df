"""From float32 stages to stages at reduced precision: ranges by calibration, and conversions where formats meet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from granet.engine.graph import Stages, tensors_of
from granet.engine.precision import BFLOAT16, FLOAT32, Format, int8_format, quantised_weight
from granet.engine.renumber import bias_of, weight_of
from granet.engine.steps import AvgPool, Convert, Convolution, Input, MaxPool, Segment, Step, Value

SAMPLE = 2048  # numbers of each tensor and batch that the choice of a range looks at
CLIPS = 24  # ranges that are compared


class Ranges:
    """The numbers that the values of a graph take on calibration batches. Call `see` for each batch.

    Args:
        graph: the graph, as a module that computes it.
        nodes: the nodes whose results are of interest.
    """

    def __init__(self, graph: fx.GraphModule, nodes: Collection[fx.Node]):
        self._graph, self._nodes = graph, set(nodes)
        self._samples: dict[fx.Node, list[Tensor]] = {}

    def see(self, args: Sequence[object]) -> object:
        """Returns the graph's result for these arguments, and remembers the nodes' results."""
        return _Watching(self._graph, self._remember).run(*args)

    def _remember(self, node: fx.Node, result: object) -> None:
        if node not in self._nodes or not isinstance(result, Tensor):
            return
        self._samples.setdefault(node, []).append(sampled(result.detach()))

    def format_of(self, node: fx.Node) -> Format:
        """Returns the int8 format with the least mean squared error on what was seen of a node's result.

        Raises:
            ValueError: if it was NaN or infinite, or nothing was seen.
        """
        if node not in self._samples:
            raise ValueError("the calibration data did not reach every layer")
        seen = torch.cat(self._samples[node])
        if not seen.isfinite().all():
            raise ValueError(f"NaN or infinite values on the calibration data, at {node.name}: int8 cannot hold them")
        return int8_format(*best_range(seen).tolist())


def sampled(x: Tensor) -> Tensor:
    """Returns the lowest and the highest number of a tensor and some of the others, in one dimension."""
    flat = x.flatten()
    return torch.cat([torch.stack(flat.aminmax()), flat[:: max(1, flat.numel() // SAMPLE)]])


def best_range(numbers: Tensor) -> Tensor:
    """Returns the lowest and the highest number that bytes should cover, for the least mean squared error on `numbers`.

    Args:
        numbers: a tensor of one dimension.
    """
    clips = torch.arange(CLIPS // 3, CLIPS + 1, device=numbers.device) / CLIPS
    ranges = clips[:, None] * torch.stack(numbers.aminmax())
    scale, zero = (part[:, None] for part in scale_and_zero(ranges))
    rounded = ((numbers / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    return ranges[(rounded - numbers).square().mean(dim=1).argmin()]


def scale_and_zero(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scales and zero points whose bytes cover ranges of shape (..., 2), and zero, as `int8_format` does."""
    low, high = ranges.clamp_max(0)[..., 0], ranges.clamp_min(0)[..., 1]
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).round().clamp(0, 255)


class _Watching(fx.Interpreter):
    """An interpreter that shows every result to `look`, and computes a node by `instead` where that is given."""

    def __init__(
        self,
        graph: fx.GraphModule,
        look: Callable[[fx.Node, object], None] | None = None,
        instead: Mapping[fx.Node, Callable[..., object]] | None = None,
    ):
        super().__init__(graph)
        self._look, self._instead = look, instead or {}

    def run_node(self, n: fx.Node) -> object:
        if n in self._instead:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = self._instead[n](*args, **kwargs)
        else:
            result = super().run_node(n)
        if self._look is not None:
            self._look(n, result)
        return result


def fake_quantised(x: Tensor, form: Format) -> Tensor:
    """Returns the numbers that a tensor's bytes stand for."""
    return ((x / form.scale).round() + form.zero).clamp(0, 255).sub(form.zero) * form.scale


def rounding_layer(graph: fx.GraphModule, node: fx.Node, form: Format, args: Sequence[object]) -> object:
    """Returns the graph's results where one layer's input and weight are rounded to int8.

    Args:
        graph: the graph.
        node: the layer, one of `granet.engine.graph.LAYERS`.
        form: the format of its input.
        args: the graph's arguments.
    """
    linear = node.target is not torch.ops.aten.convolution.default
    data = 1 if node.target is torch.ops.aten.addmm.default else 0

    def rounded(*arguments: object, **named: object) -> object:
        x, weight = arguments[data : data + 2]
        quantised, scale = quantised_weight(weight.t() if linear else weight)
        weight = quantised * scale.view(-1, *[1] * (weight.dim() - 1))
        pair = fake_quantised(x, form), weight.t() if linear else weight
        return node.target(*arguments[:data], *pair, *arguments[data + 2 :], **named)

    return _Watching(graph, instead={node: rounded}).run(*args)


def reduced(
    stages: Stages,
    precision: str,
    formats: Mapping[Value, Format],
    kept: Collection[str] = (),
    orders: Mapping[Value, Tensor] | None = None,
) -> Stages:
    """Returns the stages at a reduced precision.

    Args:
        stages: the stages in float32; they are left as they are.
        precision: "bfloat16" or "int8".
        formats: the int8 format of each value.
        kept: names of layers that stay in float32.
        orders: new numbers of channels, see `granet.engine.renumber`.
    """
    twins: dict[Segment, Segment] = {}
    for segment in stages.segments:
        twins[segment] = _Reduction(segment, precision, formats, kept, orders or {}).run()
    order = [twins.get(item, item) if isinstance(item, Segment) else item for item in stages.order]
    results = {twins[segment]: nodes for segment, nodes in stages.results.items()}
    return replace(stages, order=order, results=results)


class _Reduction:
    def __init__(
        self,
        segment: Segment,
        precision: str,
        formats: Mapping[Value, Format],
        kept: Collection[str],
        orders: Mapping[Value, Tensor],
    ):
        self.segment, self.precision, self.formats, self.kept = segment, precision, formats, kept
        self.orders = orders
        self.twin = Segment(segment.images)
        self.made: dict[tuple[Value, bool], Value] = {}  # a value's twins, by whether they are in float32
        self.readers: dict[Value, list[Step]] = {}
        for step in segment.steps:
            for value in step.inputs:
                self.readers.setdefault(value, []).append(step)

    def run(self) -> Segment:
        for step in self.segment.steps:
            self._take(step)
        self.twin.outputs = [self._in(value, FLOAT32) for value in self.segment.outputs]
        return self.twin

    def _format(self, value: Value) -> Format:
        return BFLOAT16 if self.precision == "bfloat16" else self.formats[value]

    def _low(self, step: Step) -> bool:
        """Returns whether a step reads values at reduced precision."""
        if isinstance(step, Convolution):
            return step.name not in self.kept
        return any((value, False) in self.made for value in step.inputs)

    def _in(self, value: Value, form: Format) -> Value:
        """Returns the twin of a value in float32 or in its format at reduced precision, converting it if need be."""
        wide = form == FLOAT32
        if (value, wide) not in self.made:
            source = self.made[value, not wide]
            self.made[value, wide] = replace(value, format=form)
            self.twin.steps.append(Convert(self.made[value, wide], [source]))
        return self.made[value, wide]

    def _take(self, step: Step) -> None:
        value = step.out
        if isinstance(step, Input):
            out = self.made[value, True] = replace(value)
            self.twin.steps.append(replace(step, out=out, inputs=[]))
            return
        low = self._low(step)
        inputs = [self._in(v, self._format(v) if low else FLOAT32) for v in step.inputs]
        form = self._format(value) if low and not isinstance(step, AvgPool) else FLOAT32
        if isinstance(step, MaxPool):
            form = inputs[0].format
        elif isinstance(step, Convolution) and low and self._read_in_float32(value):
            form = FLOAT32
        out = self.made[value, form == FLOAT32] = replace(value, format=form)
        if isinstance(step, Convolution):
            step = replace(step, weight=weight_of(step, self.orders), bias=bias_of(step, self.orders))
        self.twin.steps.append(replace(step, out=out, inputs=inputs))

    def _read_in_float32(self, value: Value) -> bool:
        """Returns whether nothing reads a value at reduced precision."""
        return all(isinstance(r, Convolution) and r.name in self.kept for r in self.readers.get(value, ()))


def formats_of(stages: Stages, ranges: Ranges) -> dict[Value, Format]:
    """Returns the int8 format of every value that may need one. The result of a maximum has that of its input."""
    formats: dict[Value, Format] = {}
    for segment in stages.segments:
        for step in segment.steps:
            pooled = isinstance(step, MaxPool)
            formats[step.out] = formats[step.inputs[0]] if pooled else ranges.format_of(stages.nodes[step.out])
    return formats


def relative_error(expected: object, found: object) -> float:
    """Returns the root mean square of the differences of two nests of tensors, relative to that of the expected ones.

    It is infinite if one of the numbers found is NaN or infinite.
    """
    expected, found = tensors_of([expected]), tensors_of([found])
    if not all(t.isfinite().all() for t in found):
        return float("inf")
    off = sum(F.mse_loss(b.double(), a.double(), reduction="sum").item() for a, b in zip(expected, found, strict=True))
    total = sum(a.double().square().sum().item() for a in expected)
    return (off / max(total, 1e-30)) ** 0.5
