"""The sparse layer as a torch operator: forward, shapes for tracing, and gradients.

`conv` is what the rest of the engine calls; `torch.ops.granet.*` are the operators behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from granet import native
from granet.engine import eager, encoding, gradients, reference
from granet.engine.geometry import Geometry, geometry
from granet.engine.index import IndexStructure, index_structures
from granet.engine.spec import Spec

ROWS = 64  # output channels whose sums the kernels in bfloat16 keep from one block of columns to the next


@dataclass(frozen=True)
class Layout:
    """A layer's topology on one input shape, ready for the kernels."""

    spec: Spec
    geometry: Geometry
    forward: IndexStructure
    backward: IndexStructure
    channels_last: bool = False  # the memory format of the weights that the structures point into

    def with_images(self, images: int) -> Layout:
        """The same layout for another number of images: the index structures do not depend on it."""
        return self if images == self.geometry.images else replace(self, geometry=replace(self.geometry, images=images))

    @property
    def numbers(self) -> list[int]:
        """The geometry as the operators take it."""
        return self.geometry.as_list(self.forward.blocks, self.backward.blocks)

    @property
    def structure(self) -> tuple[Tensor, ...]:
        """The index structures as the operators take them."""
        f, b = self.forward, self.backward
        return f.ptr, f.id, f.offset, f.index, b.ptr, b.id, b.offset, b.index

    @property
    def nbytes(self) -> int:
        """Bytes of index structures."""
        return self.forward.nbytes + self.backward.nbytes


@functools.cache
def cpu() -> tuple[int, int, int]:
    """Floats in a vector, longest tile and longest block tile in vectors, of the kernels chosen for this machine."""
    prepare()
    width, tile, block_tile = torch.ops.granet.cpu()
    return width, tile, block_tile


@functools.cache
def reduced_cpu() -> tuple[int, int]:
    """Returns the words in a vector and the longest tile in vectors, of the kernels at reduced precision."""
    prepare()
    _, width, tile = torch.ops.granet.reduced_cpu()
    return width, tile


@functools.cache
def bfloat16_cpu() -> tuple[int, int]:
    """Returns the numbers in a vector and the longest tile in vectors, of the kernels of training in bfloat16."""
    prepare()
    width, tile = torch.ops.granet.bfloat16_cpu()
    return width, tile


def layout(
    mask: Tensor,
    spec: Spec,
    shape: tuple[int, ...],
    batch: int | None = None,
    *,
    bfloat16: bool = False,
    channels_last: bool = False,
) -> Layout:
    """The layout of a layer with this mask for inputs of `shape` (NCHW, or (rows, features)).

    Args:
        mask: True where the weight is active.
        spec: the layer.
        shape: the input's shape.
        batch: images innermost in a plane; None chooses.
        bfloat16: whether to compute in bfloat16, with whole vectors of images innermost.
        channels_last: whether the weight has that memory format.
    """
    images, size = shape[0], ((shape[2], shape[3]) if len(shape) == 4 else (1, 1))
    width, tile = bfloat16_cpu() if bfloat16 else (cpu()[0], 0)
    if batch is None:
        batch = default_batch(images, size, spec, bfloat16=bfloat16)
    chunks = torch.get_num_threads()
    if bfloat16:
        chunks = max(1, max(spec.in_channels, spec.out_channels) // ROWS)
    place = geometry(spec, images, size, vector=width, batch=batch, chunks=chunks, tile=tile * width, bfloat16=bfloat16)
    found = index_structures(mask, place, channels_last=channels_last)
    return Layout(spec, place, *found, channels_last)


def default_batch(images: int, size: tuple[int, int], spec: Spec, *, bfloat16: bool = False) -> int:
    """How many images to lay innermost: one, unless the output is so small that vectors would stay half empty.

    In bfloat16 at least one vector of images always lies innermost.
    """
    width = bfloat16_cpu()[0] if bfloat16 else cpu()[0]
    out = spec.output_size(size)
    if out == (1, 1):
        share = -(-images // torch.get_num_threads())
        return max(1, min(-(-share // width), 8)) * width
    return width if bfloat16 or (images >= width and out[0] * out[1] <= 5 * width) else 1


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, place: Layout, *, whole: bool = False) -> Tensor:
    """The sparse layer's output for x (NCHW or (rows, features)), differentiable in x, weight and bias any times.

    Args:
        x: the input.
        weight: the dense weight, zero where it is inactive.
        bias: one number for each output channel, or None.
        place: the topology on an input of this shape.
        whole: whether the gradient of inactive weights is wanted as well; that one product then is a dense one. A
            gradient that is differentiated again (`create_graph=True`) is whole in any case, as torch computes it.
    """
    how = (place.geometry.bfloat16, place.channels_last, whole)
    return torch.ops.granet.conv(x, weight, bias, *place.structure, place.numbers, place.spec.numbers, *how)


def _conv(x, weight, bias, ptr, id_, offset, index, b_ptr, b_id, b_offset, b_index, numbers, spec, half, last, whole):
    weights = gradients.in_memory_order(weight, channels_last=last)
    if half:
        y = torch.ops.granet.conv_forward_bfloat16(_nhwc(x), weights, bias, ptr, id_, offset, index, numbers)
        y = _nchw(y)
    else:
        y = torch.ops.granet.conv_forward(_plain(x), weights, bias, ptr, id_, offset, index, numbers).to(x.dtype)
    return y.contiguous(memory_format=_format(x, weight))


def _nhwc(x: Tensor) -> Tensor:
    """Returns the activations as the kernels in bfloat16 read them: a view, if they are in channels_last format."""
    return (x if x.dim() == 2 else x.permute(0, 2, 3, 1)).contiguous()


def _nchw(x: Tensor) -> Tensor:
    """Returns the view of a result of the kernels in bfloat16 that has torch's order of dimensions."""
    return x if x.dim() == 2 else x.permute(0, 3, 1, 2)


def _plain(x: Tensor) -> Tensor:
    """Returns the activations as the kernels read them."""
    return (x.float() if x.dtype is torch.bfloat16 else x).contiguous()


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Returns the memory format that torch's own layer gives its output, and the gradient of its input."""
    if x.dim() == 4 and torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):
        return torch.channels_last
    return torch.contiguous_format


def _output_shape(x: Tensor, numbers: list[int], *, nhwc: bool = False) -> list[int]:
    outputs, *size = numbers[4:7]
    if x.dim() == 2:
        return [x.shape[0], outputs]
    return [x.shape[0], *size, outputs] if nhwc else [x.shape[0], outputs, *size]


def _setup(ctx, inputs, output):
    x, weight, bias, *structure, ctx.numbers, spec, ctx.bfloat16, ctx.channels_last, ctx.whole = inputs
    ctx.save_for_backward(x, weight, *structure)
    ctx.spec, ctx.has_bias = Spec.from_numbers(spec), bias is not None


def _backward(ctx, dy):
    x, weight, *structure = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    # gradients that will be differentiated again, or of many dy at once, are left to operators that know how
    composed = torch.is_grad_enabled() or eager.transformed()
    whole = ctx.whole or composed
    if composed:
        dx = reference.input_gradient(dy, x, weight.to(x.dtype), ctx.spec) if need_x else None
    else:
        weights = gradients.in_memory_order(weight, channels_last=ctx.channels_last)
        needs = (need_x, need_weight and not whole)
        dx, dw = active_gradients(dy, x, weights, structure, ctx.numbers, *needs, bfloat16=ctx.bfloat16)
        if need_weight and not whole:
            dw = gradients.dense(dw, structure[3], weight, channels_last=ctx.channels_last)
        if need_x:
            dx = dx.contiguous(memory_format=_format(x, weight))
    if whole and need_weight:
        dw = reference.weight_gradient(dy, x, weight.to(x.dtype), ctx.spec).to(weight.dtype)
    others = [d for d in range(dy.dim()) if d != 1]
    db = dy.sum(others, dtype=torch.float32) if ctx.has_bias and need_bias else None
    return (dx if need_x else None, dw if need_weight else None, db, *[None] * 13)


def active_gradients(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    structure: Sequence[Tensor],
    numbers: list[int],
    need_x: bool,
    need_weight: bool,
    *,
    bfloat16: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the input and of the active weights, these in the order of the forward structure.

    Args:
        dy: the gradient of the output.
        x: the input.
        weights: the numbers that the structures' `index` points into.
        structure: see `Layout.structure`.
        numbers: see `Layout.numbers`.
        need_x: whether the input's gradient is wanted; it is empty otherwise.
        need_weight: whether that of the weights is.
        bfloat16: whether the layout is one for bfloat16.
    """
    rest = (weights, *structure, numbers, need_x, need_weight)
    if bfloat16:
        dx, dw = torch.ops.granet.conv_backward_bfloat16(_nhwc(dy), _nhwc(x), *rest)
    else:
        dx, dw = torch.ops.granet.conv_backward(_plain(dy), _plain(x), *rest)
    return ((_nchw(dx) if bfloat16 else dx).to(x.dtype) if need_x else dx), dw


@functools.cache
def prepare() -> None:
    """Loads the kernels and registers what torch must know about them. Raises native.EngineUnavailable."""
    native.load()
    encoding.check(torch.ops.granet.encoding())
    forth = "Tensor ptr, Tensor id, Tensor offset, Tensor index"
    back = "Tensor back_ptr, Tensor back_id, Tensor back_offset, Tensor back_index"
    torch.library.define(
        "granet::conv",
        f"(Tensor x, Tensor weight, Tensor? bias, {forth}, {back}, int[] geometry, int[] spec, bool bfloat16, "
        "bool channels_last, bool whole) -> Tensor",
    )
    torch.library.impl("granet::conv", "CPU")(_conv)
    torch.library.register_fake("granet::conv")(
        lambda x, weight, bias, *rest: torch.empty(
            _output_shape(x, rest[-5]), dtype=x.dtype, device=x.device, memory_format=_format(x, weight)
        )
    )
    torch.library.register_fake("granet::conv_forward")(
        lambda x, weight, bias, ptr, id_, offset, index, numbers: x.new_empty(_output_shape(x, numbers))
    )

    torch.library.register_fake("granet::conv_forward_bfloat16")(
        lambda x, weight, bias, ptr, id_, offset, index, numbers: x.new_empty(_output_shape(x, numbers, nhwc=True))
    )

    def backward_shapes(dy, x, weight, ptr, id_, offset, index, *rest):
        need_x, need_weight = rest[-2:]
        return torch.empty_like(x) if need_x else x.new_empty(0), weight.new_empty(len(index) if need_weight else 0)

    torch.library.register_fake("granet::conv_backward")(backward_shapes)
    torch.library.register_fake("granet::conv_backward_bfloat16")(backward_shapes)
    torch.library.register_autograd("granet::conv", _backward, setup_context=_setup)
