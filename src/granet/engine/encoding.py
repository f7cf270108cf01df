"""The encoding of programs for the native operator `run` (program.h): rows of integers with named fields.

A program consists of the number of slots, the number of steps, and one row of `ROW_LENGTH` integers for each of them.
A slot is a set of planes in the arena. Slots and constants are given by their numbers; -1 means that there is none.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROW_LENGTH = 24  # integers in a row; the last one of a step counts the following steps that are computed with it
KINDS = {"sparse": 0, "block": 1, "vector": 2, "words": 3}
ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2, "silu": 3}
PRECISIONS = {"float32": 0, "bfloat16": 1, "int8": 2}


class SlotRow(NamedTuple):
    """A set of planes in the arena: `blocks` times `planes` planes of `stride` words, starting at word `place`.

    A word holds one float32 number, two bfloat16 numbers, or four bytes. `fill` is the byte that stands for zero.
    """

    place: int
    planes: int
    blocks: int
    images: int
    height: int
    width: int
    pitch: int
    batch: int
    front: int
    stride: int
    precision: int = 0
    fill: int = 0


class PackStep(NamedTuple):
    """A step that copies input number `input` into planes, one for each channel and phase."""

    input: int
    out: int
    channels: int
    height: int
    width: int
    phases: int
    stride_y: int = 1
    stride_x: int = 1


class UnpackStep(NamedTuple):
    """A step that makes an output tensor with the given number of dimensions from a slot."""

    source: int
    channels: int
    height: int
    width: int
    dimensions: int


class ConvStep(NamedTuple):
    """A convolution with its bias, residual and activation. The fields from `ptr` to `keep` are constants.

    At reduced precision there are two more constants: `scale` for each output channel, and the `factors` of the
    residual and the output (residual_scale, out_scale, out_zero; see reduced.h).
    """

    source: int
    out: int
    residual: int
    ptr: int
    id: int
    offset: int
    value: int
    bias: int
    keep: int
    chunks: int
    blocks: int
    activation: int
    kind: int
    tile: int
    scale: int = -1
    factors: int = -1


class SplitStep(NamedTuple):
    """A step that splits every plane into its phases, for a strided layer that follows."""

    source: int
    out: int
    phases: int
    stride_y: int
    stride_x: int


class MaxPoolStep(NamedTuple):
    """A maximum over windows."""

    source: int
    out: int
    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int


class AvgPoolStep(NamedTuple):
    """A mean over all positions, in float32. `factors` are the scale and zero point of bytes."""

    source: int
    out: int
    factors: int = -1


class AddStep(NamedTuple):
    """A sum of one or two slots, followed by an activation.

    At reduced precision, `factors` is a constant of five numbers (a_scale, b_scale, shift, out_scale, out_zero; see
    reduced.h).
    """

    source: int
    out: int
    other: int
    activation: int
    factors: int = -1


class ConvertStep(NamedTuple):
    """A step that converts planes of float32 numbers to words, or the reverse. `factors` are a scale and zero point."""

    source: int
    out: int
    factors: int = -1


# By operation number.
STEPS = (
    PackStep,
    UnpackStep,
    ConvStep,
    SplitStep,
    MaxPoolStep,
    AvgPoolStep,
    AddStep,
    ConvertStep,
)  # by operation number
AnyStep = PackStep | UnpackStep | ConvStep | SplitStep | MaxPoolStep | AvgPoolStep | AddStep | ConvertStep


def encode(slots: list[SlotRow], steps: list[AnyStep], links: list[int]) -> list[int]:
    """Returns the program as the native `run` takes it. `links` counts, for each step, the later ones joined to it."""
    rows = [[*slot, *[0] * (ROW_LENGTH - len(slot))] for slot in slots]
    for step, joined in zip(steps, links, strict=True):
        numbers = [STEPS.index(type(step)), *step]
        rows.append([*numbers, *[0] * (ROW_LENGTH - 1 - len(numbers)), joined])
    return [len(slots), len(steps), *(number for row in rows for number in row)]


def slots_of(program: Sequence[int]) -> list[SlotRow]:
    """Returns the slots of an encoded program."""
    return [SlotRow(*row[: len(SlotRow._fields)]) for row in _rows(program, 0, program[0])]


def steps_of(program: Sequence[int]) -> list[AnyStep]:
    """Returns the steps of an encoded program."""
    kinds = [(STEPS[row[0]], row) for row in _rows(program, program[0], program[1])]
    return [kind(*row[1 : 1 + len(kind._fields)]) for kind, row in kinds]


def _rows(program: Sequence[int], first: int, count: int) -> Iterator[Sequence[int]]:
    for i in range(first, first + count):
        yield program[2 + ROW_LENGTH * i : 2 + ROW_LENGTH * (i + 1)]


def check(found: list[int]) -> None:
    """Compares this encoding with that of the loaded kernels, `torch.ops.granet.encoding()`.

    Raises:
        RuntimeError: if they differ, so that the compiled kernels belong to another version of granet.
    """
    # a step's row begins with its operation number
    sizes = [1 + len(step._fields) for step in STEPS]
    mine = [ROW_LENGTH, len(SlotRow._fields), *sizes, len(ACTIVATIONS), len(KINDS), len(PRECISIONS)]
    if list(found) != mine:
        raise RuntimeError(
            f"the compiled kernels belong to another version of granet (they encode programs as {list(found)}, this "
            f"version as {mine}); compile them anew with `python -m granet.native`"
        )
