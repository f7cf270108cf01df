"""Layers and sums at reduced precision: their packed weights, and the numbers that turn sums into outputs.

With bytes, a sum of products is an integer. The output is sum * scale + shift, plus the residual (see WordEpilogue in
csrc/reduced.h). Where the output's byte follows from that directly, scale and shift are in the units of that byte, and
its limits 0 and 255 are those of the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granet.engine.geometry import Geometry
from granet.engine.precision import WordStructure, quantised_weight, word_structure
from granet.engine.steps import Add, Convolution, Value


def to_int8(value: Value) -> tuple[float, float] | None:
    """Returns the factor and zero point that make bytes of float32 numbers, or None if the value is not in int8."""
    return (1 / value.format.scale, value.format.zero) if value.format.precision == "int8" else None


def from_int8(value: Value) -> tuple[float, float] | None:
    """Returns the scale and zero point of a value in int8, None for any other."""
    return (value.format.scale, value.format.zero) if value.format.precision == "int8" else None


def applies_activation(layer: Convolution) -> bool:
    """Returns whether a layer at reduced precision has to apply its activation to real numbers.

    It need not where the output's bytes end where the activation does.
    """
    out = layer.out.format
    if out.precision != "int8" or layer.activation == "silu":
        return True
    top = (255 - out.zero) * out.scale
    return layer.activation != "" and (out.zero != 0 or (layer.activation == "relu6" and top > 6.00001))


def packed_words(layer: Convolution, geometry: Geometry, chunks: int) -> tuple[WordStructure, tuple[Tensor, ...]]:
    """Returns a layer's words, and the scale and shift of each output channel with the factors of the epilogue."""
    source, out, outputs = layer.inputs[0].format, layer.out.format, layer.spec.out_channels
    shift = torch.zeros(outputs) if layer.bias is None else layer.bias.float().clone()
    factors = [1.0, 0.0, 0.0]  # of the residual, and of the output where it is requantised
    if source.precision == "bfloat16":
        weight, scale = layer.weight.to(torch.bfloat16), torch.ones(outputs)
    else:
        weight, scale = quantised_weight(layer.weight.float())
        scale = scale * source.scale
        shift -= scale * source.zero * weight.flatten(1).sum(dim=1, dtype=torch.int32)
        if len(layer.inputs) > 1:
            residual = layer.inputs[1].format
            factors[0] = residual.scale
            shift -= residual.scale * residual.zero
        if out.precision == "int8" and applies_activation(layer):
            factors[1:] = 1 / out.scale, out.zero
        elif out.precision == "int8":
            factors[0] /= out.scale
            scale, shift = scale / out.scale, shift / out.scale + out.zero
    words = word_structure(weight, layer.spec, geometry, chunks)
    missing = words.groups * source.channels - outputs
    scale, shift = (torch.nn.functional.pad(numbers, (0, missing)) for numbers in (scale, shift))
    return words, (scale, shift, torch.tensor(factors))


def sum_factors(step: Add) -> tuple[float, ...] | None:
    """Returns the factors of a sum (see AddStep) at reduced precision, or None in float32."""
    out, inputs = step.out.format, [value.format for value in step.inputs]
    if out.precision == "float32":
        return None
    if out.precision == "bfloat16":
        return (1.0, 1.0, 0.0, 1.0, 0.0)
    shift = -sum(i.scale * i.zero for i in inputs)
    return (inputs[0].scale, inputs[-1].scale, shift, 1 / out.scale, out.zero)
