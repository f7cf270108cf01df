"""The records in the header of a saved compiled model. Reading them checks types and ranges; nothing else is accepted.

A file holds one program for each shape of inputs. A program is a list of nodes in the order in which they run, and a
node refers to earlier ones by their numbers. Some nodes are segments, which run on the kernels; their steps refer to
each other in the same way.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from granet.engine.report import InferenceReport

FORMAT = 1  # the version of what is described here
LARGEST = 2**31 - 1

Number = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Pair = tuple[Number, Number]
Size = tuple[Positive, Positive]
Shape = tuple[Number, ...]
Activation = Literal["", "relu", "relu6", "silu"]


class Record(BaseModel):
    """A part of the header."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ValueRecord(Record):
    """A `Value`, without the number of images, which is that of its segment. It is the result of one step."""

    channels: Positive
    size: Size
    shape: Shape
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    zero: Annotated[int, Field(ge=0, le=255)] = 0


class InputStep(Record):
    """A tensor that enters the segment."""

    op: Literal["input"] = "input"
    out: ValueRecord


class LayerStep(Record):
    """A convolution or linear layer, packed. Its tensors have the name of the step in front of theirs.

    `lanes` are the pitch, front and plane of the activations for which the weights were packed.
    """

    op: Literal["layer"] = "layer"
    out: ValueRecord
    inputs: Annotated[tuple[Number, ...], Field(min_length=1, max_length=2)]
    name: str
    channels: Positive
    kernel: Size
    stride: Size
    padding: Pair
    dilation: Size
    groups: Positive
    activation: Activation
    kind: Literal["sparse", "block", "vector", "words"]
    vectors: Annotated[int, Field(ge=1, le=64)]
    chunks: Positive
    blocks: Positive
    lanes: tuple[Positive, Number, Positive]


class MaxPoolStep(Record):
    """A maximum over windows."""

    op: Literal["max_pool"] = "max_pool"
    out: ValueRecord
    inputs: tuple[Number]
    kernel: Size
    stride: Size
    padding: Pair


class AvgPoolStep(Record):
    """A mean over all positions."""

    op: Literal["avg_pool"] = "avg_pool"
    out: ValueRecord
    inputs: tuple[Number]


class AddStep(Record):
    """A sum of one or two values, then an activation."""

    op: Literal["add"] = "add"
    out: ValueRecord
    inputs: Annotated[tuple[Number, ...], Field(min_length=1, max_length=2)]
    activation: Activation


class ConvertStep(Record):
    """The same numbers in another format."""

    op: Literal["convert"] = "convert"
    out: ValueRecord
    inputs: tuple[Number]


AnyStep = Annotated[
    InputStep | LayerStep | MaxPoolStep | AvgPoolStep | AddStep | ConvertStep, Field(discriminator="op")
]


class FormRecord(Record):
    """The shape of a result, and its stride unless it is contiguous."""

    shape: Shape
    stride: Shape | None = None


class ArgumentNode(Record):
    """A tensor that the caller passes, by its number."""

    op: Literal["argument"] = "argument"
    number: Number


class TensorNode(Record):
    """A tensor in the file. `stride` is given where it is not contiguous in the model."""

    op: Literal["tensor"] = "tensor"
    stride: Shape | None = None


class SegmentNode(Record):
    """A segment: steps that run in one call of the kernels. Its result is a list of tensors, one for each form."""

    op: Literal["segment"] = "segment"
    inputs: tuple[Number, ...]
    images: Positive
    batch: Annotated[int, Field(ge=1, le=4096)]
    chain: bool
    steps: tuple[AnyStep, ...]
    outputs: tuple[Number, ...]
    forms: tuple[tuple[FormRecord, ...], ...]


class CallNode(Record):
    """A call of an operator of torch. In its arguments, {"node": 3} is the result of node 3."""

    op: Literal["call"] = "call"
    name: str
    args: list[JsonValue]
    kwargs: dict[str, JsonValue] = {}


AnyNode = Annotated[ArgumentNode | TensorNode | SegmentNode | CallNode, Field(discriminator="op")]


class ProgramRecord(Record):
    """What is computed for inputs of one form.

    Attributes:
        inputs: the form of the call's arguments: see `granet.engine.saved.forms`.
        nodes: what runs, in order.
        results: the numbers of the nodes whose results are returned.
        output: the form of the call's output, whose tensors are the results.
        report: what was measured.
    """

    inputs: JsonValue
    nodes: tuple[AnyNode, ...]
    results: tuple[Number, ...]
    output: JsonValue
    report: InferenceReport


class Header(Record):
    """What a file says about itself.

    Attributes:
        format: the version of the format.
        granet: the version of granet that wrote it.
        torch: the version of torch.
        isa: the instruction set for which it was measured, as GRANET_ISA would name it.
        threads: the number of threads with which it was measured.
        programs: one for each form of inputs.
    """

    format: Literal[1]
    granet: str
    torch: str
    isa: str
    threads: Positive
    programs: Annotated[tuple[ProgramRecord, ...], Field(min_length=1)]
