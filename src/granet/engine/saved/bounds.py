"""Checks of an encoded program before it runs: no kernel reads or writes outside of the memory that it is given.

The native operator trusts the index structures of the weights, because they are usually made by granet itself. Those of
a file are checked here against the planes that they refer to, on the rows that the operator reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granet.engine import encoding
from granet.engine.encoding import KINDS, PRECISIONS, ConvStep, SlotRow
from granet.engine.geometry import LINE
from granet.engine.precision import CHANNELS
from granet.engine.program import GROUP, Program

LARGEST_ARENA = 2**36  # floats

_PER_WORD = {PRECISIONS[name]: channels for name, channels in CHANNELS.items()}


def check(program: Program) -> None:
    """Raises a ValueError if a step would read or write outside of its planes, or leave some of them unwritten."""
    if program.arena_floats > LARGEST_ARENA:
        raise ValueError(f"the activations would take {4 * program.arena_floats / 2**30:.0f} GiB")
    numbers = program.program.tolist()
    slots = encoding.slots_of(numbers)
    for i, slot in enumerate(slots):
        if slot.planes * slot.stride >= 2**31:
            raise ValueError(f"the activations of value {i} exceed 8 GiB for one block of images")
        if slot.place + slot.blocks * slot.planes * slot.stride > program.arena_floats:
            raise ValueError(f"value {i} reaches outside of the memory for activations")
    names = {steps[-1]: layer.name for layer, steps in program.layer_steps.items()}
    for i, step in enumerate(encoding.steps_of(numbers)):
        if isinstance(step, ConvStep):
            try:
                _check_layer(step, slots, program.constants)
            except ValueError as error:
                raise ValueError(f"layer {names.get(i)!r}: {error}") from None


def _check_layer(step: ConvStep, slots: list[SlotRow], constants: list[Tensor]) -> None:
    source, out = slots[step.source], slots[step.out]
    ptr, ids, offset, value = (constants[i] for i in (step.ptr, step.id, step.offset, step.value))
    words, block = step.kind == KINDS["words"], step.kind == KINDS["block"]
    per_word = _PER_WORD[source.precision]
    channels = out.planes * _PER_WORD[out.precision]  # of a whole number of words
    groups = -(-channels // per_word) if words else channels // (GROUP if block else 1)
    if block and (channels % GROUP or step.blocks != 1):
        raise ValueError(f"groups of {GROUP} output channels do not fit {channels} channels in {step.blocks} blocks")
    whole = words or step.kind == KINDS["vector"]
    if (whole and step.blocks != 1) or (step.kind == KINDS["vector"] and step.chunks != 1):
        raise ValueError(f"its kernel does not divide rows into {step.blocks} blocks and {step.chunks} chunks")
    rows = groups * step.blocks
    if ids.numel() != rows or groups % step.chunks:
        raise ValueError(f"{ids.numel()} rows do not fit {rows} rows in {step.chunks} chunks")
    # a row of each output channel, in every block
    wanted = torch.arange(groups, dtype=torch.int32) * (GROUP if block else 1)
    found = ids.view(step.chunks, step.blocks, -1).transpose(0, 1).reshape(step.blocks, -1).sort(dim=1).values
    if not torch.equal(found, wanted.expand_as(found)):
        raise ValueError("its rows do not belong to one output channel each")
    if ptr.numel() != rows * (per_word if words else 1) + 1:
        raise ValueError(f"{ptr.numel()} beginnings of rows do not fit {rows} rows")
    if ptr[0] != 0 or ptr[-1] != offset.numel() or (ptr[1:] < ptr[:-1]).any():
        raise ValueError(f"its rows do not begin one after another, from 0 to {offset.numel()}")
    if value.numel() != offset.numel() * (GROUP if block else 1):
        raise ValueError(f"{value.numel()} weights do not fit {offset.numel()} places")
    padded = groups * per_word if words else channels
    if step.bias >= 0 and constants[step.bias].numel() != padded:
        raise ValueError(f"{constants[step.bias].numel()} biases do not fit {padded} channels")
    if words and (constants[step.scale].numel() != padded or constants[step.factors].numel() != 3):
        raise ValueError(f"its scales do not fit {padded} channels")
    if step.kind == KINDS["vector"]:
        low, high = 0, source.planes - 1
    else:  # the last vector of an output row may end after it
        written = -(-((out.height - 1) * out.pitch + out.width) * out.batch // LINE) * LINE
        low, high = -source.front, source.planes * source.stride - source.front - written
        if out.front + written > out.stride or (source.front, source.stride) != (out.front, out.stride):
            raise ValueError("its input and output lie differently")
    if step.residual >= 0:
        residual = slots[step.residual]
        places = [(slot.front, slot.stride, slot.blocks) for slot in (residual, out)]
        if places[0] != places[1] or residual.planes * _PER_WORD[residual.precision] < channels:
            raise ValueError("its residual and output lie differently")
    if offset.numel() and not low <= int(offset.min()) <= int(offset.max()) <= high:
        raise ValueError(f"it reads from place {int(offset.min())} to {int(offset.max())}, outside of {low} to {high}")
