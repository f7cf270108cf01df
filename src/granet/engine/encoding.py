"""How programs are written down for the native `run` (program.h): rows of whole numbers, each with its named fields.

A program is a number of slots, a number of steps, and a row of `ROW` numbers for each of them. Slots (of planes in the
arena) and constants are given by their numbers, -1 where there is none.
"""

from typing import NamedTuple

ROW = 24  # numbers in a row; the last one of a step says how many steps after it are computed with it
KINDS = {"sparse": 0, "block": 1, "vector": 2}
ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2, "silu": 3}


class SlotRow(NamedTuple):
    """Planes in the arena: `blocks` times `planes` planes of `stride` floats, from the float at `place` on."""

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


class PackStep(NamedTuple):
    """Brings input number `input` into planes, one for each channel and phase."""

    input: int
    out: int
    channels: int
    height: int
    width: int
    phases: int
    stride_y: int = 1
    stride_x: int = 1


class UnpackStep(NamedTuple):
    """Makes an output tensor with so many dimensions of a slot."""

    source: int
    channels: int
    height: int
    width: int
    dimensions: int


class ConvStep(NamedTuple):
    """A convolution with its bias, residual and activation; `ptr` to `keep` are constants."""

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


class SplitStep(NamedTuple):
    """Splits every plane into its phases, for a strided layer that follows."""

    source: int
    out: int
    phases: int
    stride_y: int
    stride_x: int


class MaxPoolStep(NamedTuple):
    """The maximum over windows."""

    source: int
    out: int
    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int


class AvgPoolStep(NamedTuple):
    """The mean over all positions."""

    source: int
    out: int


class AddStep(NamedTuple):
    """The sum of one or two slots, then an activation."""

    source: int
    out: int
    other: int
    activation: int


STEPS = (PackStep, UnpackStep, ConvStep, SplitStep, MaxPoolStep, AvgPoolStep, AddStep)  # by operation number
AnyStep = PackStep | UnpackStep | ConvStep | SplitStep | MaxPoolStep | AvgPoolStep | AddStep


def encode(slots: list[SlotRow], steps: list[AnyStep], links: list[int]) -> list[int]:
    """The program as the native `run` takes it; `links` says for each step how many after it are joined to it."""
    rows = [[*slot, *[0] * (ROW - len(slot))] for slot in slots]
    for step, joined in zip(steps, links, strict=True):
        numbers = [STEPS.index(type(step)), *step]
        rows.append([*numbers, *[0] * (ROW - 1 - len(numbers)), joined])
    return [len(slots), len(steps), *(number for row in rows for number in row)]


def check(found: list[int]) -> None:
    """Compares this encoding with that of the kernels that were loaded, `torch.ops.granet.encoding()`.

    Raises:
        RuntimeError: they differ, so the compiled kernels belong to another version of granet.
    """
    # a step's row begins with its operation number
    sizes = [1 + len(step._fields) for step in STEPS]
    mine = [ROW, len(SlotRow._fields), *sizes, len(ACTIVATIONS), len(KINDS)]
    if list(found) != mine:
        raise RuntimeError(
            f"the compiled kernels encode programs as {list(found)}, this version of granet as {mine}: they are of "
            "another version; compile them anew with `python -m granet.native`"
        )
