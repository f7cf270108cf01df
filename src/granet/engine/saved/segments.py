"""Segments in files: their steps as records, and their packed weights as tensors.

What is not stored is made anew: where values lie in memory, and the rows of the encoded program. A file can therefore
say what a network computes, but not at which address; `granet.engine.saved.bounds` checks the index structures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from granet.engine import encoding, ops
from granet.engine.index import IndexStructure
from granet.engine.precision import FLOAT32, Format, WordStructure
from granet.engine.program import KernelChoice, Program
from granet.engine.runtime import SegmentRunner
from granet.engine.saved import bounds, records
from granet.engine.spec import Spec
from granet.engine.steps import Add, AvgPool, Convert, Convolution, Input, MaxPool, Segment, Step, Value

PARTS = ("ptr", "id", "offset", "value", "bias", "scale", "factors")  # of a layer's tensors


def stored(runner: SegmentRunner, inputs: tuple[int, ...], add: Callable[[str, Tensor], None]) -> records.SegmentNode:
    """Returns the record of a segment; `add` takes its packed weights and their names.

    Args:
        runner: the segment, packed.
        inputs: the nodes whose results it takes.
        add: called for each tensor.
    """
    program = runner.program
    segment = program.segment
    numbers = {step.out: i for i, step in enumerate(segment.steps)}
    return records.SegmentNode(
        inputs=inputs,
        images=segment.images,
        batch=program.batch,
        chain=program.chain,
        steps=tuple(_stored_step(program, step, i, numbers, add) for i, step in enumerate(segment.steps)),
        outputs=tuple(numbers[value] for value in segment.outputs),
        forms=tuple(tuple(records.FormRecord(shape=s, stride=t) for s, t in forms) for forms in runner.forms),
    )


def _stored_step(program: Program, step: Step, number: int, numbers: dict[Value, int], add: Callable) -> Any:
    value, form = step.out, step.out.format
    common: dict[str, Any] = {
        "out": records.ValueRecord(
            channels=value.channels,
            size=value.size,
            shape=value.shape,
            precision=form.precision,
            scale=form.scale,
            zero=form.zero,
        )
    }
    if isinstance(step, Input):
        return records.InputStep(**common)
    common["inputs"] = tuple(numbers[v] for v in step.inputs)
    if isinstance(step, MaxPool):
        return records.MaxPoolStep(**common, kernel=step.kernel, stride=step.stride, padding=step.padding)
    if isinstance(step, AvgPool):
        return records.AvgPoolStep(**common)
    if isinstance(step, Add):
        return records.AddStep(**common, activation=step.activation)
    if isinstance(step, Convert):
        return records.ConvertStep(**common)
    conv = encoding.steps_of(program.program.tolist())[program.layer_steps[step][-1]]
    for part in PARTS:
        place = getattr(conv, part)
        if place >= 0:
            add(f"{number}.{part}", program.constants[place])
    spec, lanes = step.spec, program.lanes_of(step)
    kind = next(name for name, kind in encoding.KINDS.items() if kind == conv.kind)
    return records.LayerStep(
        **common,
        name=step.name,
        channels=spec.in_channels,
        kernel=spec.kernel,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        activation=step.activation,
        kind=kind,
        vectors=conv.tile // ops.cpu()[0],
        chunks=conv.chunks,
        blocks=conv.blocks,
        lanes=(lanes.pitch, lanes.front, lanes.plane),
    )


def restored(node: records.SegmentNode, tensors: Mapping[str, Tensor]) -> SegmentRunner:
    """Returns the segment of a record, ready to run.

    Args:
        node: the record.
        tensors: the packed weights, by the names that `stored` gave them.

    Raises:
        ValueError: if the record is no network, or a weight would be read or written where it must not be.
    """
    segment, values = Segment(node.images), []
    choices: dict[Convolution, KernelChoice] = {}
    packed: dict = {}
    lanes: dict[Convolution, tuple[int, ...]] = {}
    for i, record in enumerate(node.steps):
        try:
            step = _step(record, node.images, values)
            if isinstance(step, Convolution):
                choices[step] = KernelChoice(record.kind, record.vectors)
                _keep(step, record, {p: tensors[n] for p in PARTS if (n := f"{i}.{p}") in tensors}, packed)
                lanes[step] = record.lanes
        except ValueError as error:
            raise ValueError(f"step {i}, {record.op}: {error}") from None
        segment.steps.append(step)
        values.append(step.out)
    segment.outputs = [_earlier(values, number) for number in node.outputs]
    if any(value.format != FLOAT32 for value in segment.outputs):
        raise ValueError("a segment returns a value that is not in float32")
    count = sum(isinstance(step, Input) for step in segment.steps)
    if count == 0 or count != len(node.inputs):
        raise ValueError(f"a segment takes {count} tensors and is given {len(node.inputs)}")
    program = Program(segment, choices.__getitem__, node.batch, chain=node.chain, kept=packed)
    for step, wanted in lanes.items():
        found = program.lanes_of(step)
        if (found.pitch, found.front, found.plane) != wanted:
            raise ValueError(
                f"layer {step.name} was packed for activations that lie differently ({wanted}) than this version of "
                f"granet lays them ({(found.pitch, found.front, found.plane)}): save the compiled model again"
            )
    bounds.check(program)
    return SegmentRunner(program, _forms(node, segment))


def _earlier(values: list[Value], number: int) -> Value:
    if number >= len(values):
        raise ValueError(f"it refers to the result of step {number}, and there are {len(values)} before it")
    return values[number]


def _step(record: Any, images: int, values: list[Value]) -> Step:
    """Returns the step of a record, whose inputs are results of earlier steps that fit it."""
    form = Format(record.out.precision, record.out.scale, record.out.zero)
    out = Value(images, record.out.channels, record.out.size, record.out.shape, form)
    if math.prod(out.shape) != images * out.channels * math.prod(out.size):
        raise ValueError(f"a tensor of shape {out.shape} does not hold {images} x {out.channels} x {out.size} numbers")
    if isinstance(record, records.InputStep):
        _require(form == FLOAT32, "what enters a segment must be in float32")
        return Input(out, [], key=None)
    inputs = [_earlier(values, number) for number in record.inputs]
    first, extents = inputs[0], {(v.channels, v.size) for v in (*inputs, out)}
    same = {v.format.precision for v in (*inputs, out)}
    if isinstance(record, records.LayerStep):
        return _layer(record, out, inputs)
    if isinstance(record, records.MaxPoolStep):
        step = MaxPool(out, inputs, record.kernel, record.stride, record.padding)
        window = Spec(in_channels=1, out_channels=1, kernel=record.kernel, stride=record.stride, padding=record.padding)
        _require(
            all(p < k for p, k in zip(step.padding, step.kernel, strict=True)), "the padding is not below the kernel"
        )
        _require(window.output_size(first.size) == out.size and first.channels == out.channels, "sizes do not fit")
        _require(first.format == form, "the result of a maximum must have the format of its input")
        return step
    if isinstance(record, records.AvgPoolStep):
        _require(out.size == (1, 1) and first.channels == out.channels, "sizes do not fit")
        _require(form == FLOAT32, "a mean must be in float32")
        return AvgPool(out, inputs)
    _require(len(extents) == 1, f"its values differ in channels and size: {sorted(extents)}")
    if isinstance(record, records.AddStep):
        _require(len(same) == 1, f"its values differ in precision: {sorted(same)}")
        return Add(out, inputs, activation=record.activation)
    _require(len(same) == 2 and "float32" in same, f"it converts between {sorted(same)}, one of which must be float32")
    return Convert(out, inputs)


def _layer(record: records.LayerStep, out: Value, inputs: list[Value]) -> Convolution:
    spec = Spec(
        in_channels=record.channels,
        out_channels=out.channels,
        kernel=record.kernel,
        stride=record.stride,
        padding=record.padding,
        dilation=record.dilation,
        groups=record.groups,
    )
    source, precision = inputs[0], inputs[0].format.precision
    _require(source.channels == spec.in_channels, f"it takes {spec.in_channels} channels, not {source.channels}")
    _require(
        spec.in_channels % spec.groups == spec.out_channels % spec.groups == 0,
        f"{spec.in_channels} and {spec.out_channels} channels do not divide into {spec.groups} groups",
    )
    _require(
        spec.output_size(source.size) == out.size, f"its output is {spec.output_size(source.size)}, not {out.size}"
    )
    for value in inputs[1:]:
        _require((value.channels, value.size) == (out.channels, out.size), "the residual has another size")
        _require(value.format.precision == precision, "the residual has another precision than the input")
    _require((record.kind == "words") == (precision != "float32"), f"kernel {record.kind} does not compute {precision}")
    _require(out.format.precision in ("float32", precision), f"it makes {out.format.precision} of {precision}")
    if record.kind == "vector":
        one = spec.kernel == spec.stride == source.size == (1, 1) and spec.padding == (0, 0)
        _require(one, "kernel vector computes layers of one position only")
    return Convolution(out, inputs, name=record.name, spec=spec, activation=record.activation)


def _keep(step: Convolution, record: records.LayerStep, tensors: dict[str, Tensor], packed: dict) -> None:
    """Puts a layer's tensors where `Program` looks for packed weights."""

    def take(part: str, dtype: torch.dtype = torch.int32) -> Tensor:
        if part not in tensors:
            raise ValueError(f"its tensor {part} is missing")
        found = tensors[part]
        _require(found.dtype == dtype and found.dim() == 1, f"its tensor {part} must be a list of {dtype}")
        return found

    places = [take(part) for part in ("ptr", "id", "offset")]
    if record.kind == "words":
        structure = WordStructure(*places, take("value"), record.chunks)
        finish = [take(part, torch.float32) for part in ("scale", "bias", "factors")]
        for part, numbers in zip(("scale", "bias", "factors"), finish, strict=True):
            _require(bool(numbers.isfinite().all()), f"its tensor {part} holds NaN or infinite values")
        packed[step, "words"] = structure, tuple(finish)
        return
    structure = IndexStructure(*places, torch.zeros(0, dtype=torch.int32), record.blocks, record.chunks)
    packed[step, KernelChoice(record.kind, record.vectors)] = structure, take("value", torch.float32)
    step.bias = take("bias", torch.float32) if "bias" in tensors else None


def _forms(node: records.SegmentNode, segment: Segment) -> list[list[tuple]]:
    """Returns the forms of the segment's results, each of which holds the numbers of its output exactly once."""
    _require(len(node.forms) == len(segment.outputs), "a segment has as many forms as outputs")
    for value, forms in zip(segment.outputs, node.forms, strict=True):
        for form in forms:
            _require(math.prod(form.shape) == math.prod(value.shape), "a result has another size than its output")
            check_stride(form.shape, form.stride)
    return [[(form.shape, form.stride) for form in forms] for forms in node.forms]


def check_stride(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> None:
    """Raises a ValueError unless a tensor of this shape and stride is dense and no two elements share a place."""
    if stride is None:
        return
    reach = 1
    ordered = sorted((s, n) for s, n in zip(stride, shape, strict=False) if n != 1)
    fits = len(shape) == len(stride)
    for step, count in ordered:
        fits, reach = fits and step == reach, reach * count
    _require(fits, f"a tensor of shape {shape} cannot have the stride {stride}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
