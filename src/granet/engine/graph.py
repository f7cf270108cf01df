"""Lowering of a captured graph of aten operators to stages: segments for the kernels, and nodes that torch runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from granet.engine.spec import Spec
from granet.engine.steps import Add, AvgPool, Convolution, Input, MaxPool, Segment, Step, Value
from granet.engine.weights import Constants
from granet.names import described

aten = torch.ops.aten
_ACTIVATIONS = {aten.relu.default: "relu", aten.silu.default: "silu"}
_ALIASES = (aten.view.default, aten._unsafe_view.default, aten.clone.default, aten.alias.default, aten.detach.default)
_ALIASES += (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
LAYERS = (aten.convolution.default, aten.addmm.default, aten.mm.default)


@dataclass
class Stages:
    """A captured graph, in the order in which it runs.

    Attributes:
        graph: the graph.
        order: segments and nodes of the graph, each after everything it depends on.
        results: for each segment and each of its outputs, the nodes whose results the output stands for.
        nodes: for each value, the last node whose result it is.
        layers: for each layer, its node.
    """

    graph: fx.Graph
    order: list[Segment | fx.Node] = field(default_factory=list)
    results: dict[Segment, list[list[fx.Node]]] = field(default_factory=dict)
    nodes: dict[Value, fx.Node] = field(default_factory=dict)
    layers: dict[Convolution, fx.Node] = field(default_factory=dict)

    @property
    def segments(self) -> list[Segment]:
        """Returns the segments, in order."""
        return [s for s in self.order if isinstance(s, Segment)]


def lower(graph: fx.Graph, constants: Constants, names: dict[fx.Node, str]) -> Stages:
    """Returns the stages of a functional graph of aten operators whose nodes carry the shapes of tensors (meta["val"]).

    Args:
        graph: the graph, without mutations.
        constants: the values of its parameters and buffers.
        names: the name of each parameter, by its placeholder.
    """
    return _Lowering(graph, constants, names).run()


class _Lowering:
    def __init__(self, graph: fx.Graph, constants: Constants, names: dict[fx.Node, str]):
        self.stages = Stages(graph)
        self.constants, self.weight_names = constants, names
        self.segment: Segment | None = None
        self.values: dict[fx.Node, Value] = {}  # the nodes whose results are inside the open segment
        self.maker: dict[Value, Step] = {}
        self.names: dict[Value, list[fx.Node]] = {}

    def run(self) -> Stages:
        for node in self.stages.graph.nodes:
            if node.op != "call_function" or not self._take(node):
                if any(n in self.values for n in node.all_input_nodes):
                    self._close()
                self.stages.order.append(node)
        return self.stages

    # A segment is placed where it is closed: after the nodes whose results it reads, before those that read its own.

    def _close(self) -> None:
        segment, inside = self.segment, set(self.values)
        if segment is None:
            return
        results = []
        for value, nodes in self.names.items():
            later = [n for n in nodes if any(user not in inside for user in n.users)]
            if isinstance(self.maker[value], Input):  # aliases of a tensor that torch made: torch makes them, too
                self.stages.order.extend(nodes[1:] if later else ())
            elif later:
                segment.outputs.append(value)
                results.append(later)
        if segment.outputs:
            self.stages.order.append(segment)
            self.stages.results[segment] = results
        self.segment, self.values, self.maker, self.names = None, {}, {}, {}

    def _open(self, images: int) -> None:
        if self.segment is not None and self.segment.images != images:
            self._close()
        if self.segment is None:
            self.segment = Segment(images)

    def _enter(self, node: fx.Node, extent: tuple[int, int, tuple[int, int]]) -> Value:
        """Returns the value of a node's result in the open segment, adding an input to the segment if needed."""
        if node not in self.values:
            self._add(node, Input(Value(*extent, shape_of(node)), [], key=node))
        return self.values[node]

    def _add(self, node: fx.Node, step: Step) -> None:
        self.segment.steps.append(step)
        self.maker[step.out] = step
        self._alias(node, step.out)

    def _alias(self, node: fx.Node, value: Value) -> None:
        value.shape = shape_of(node)
        self.values[node] = value
        if isinstance(node.meta["val"], Tensor):
            self.stages.nodes[value] = node
        self.names.setdefault(value, []).append(node)

    # Nodes

    def _take(self, node: fx.Node) -> bool:
        """Returns whether the node became part of a segment."""
        target = node.target
        if target is operator.getitem:  # the first result of batch normalization or of a pool
            return node.args[0] in self.values and node.args[1] == 0 and self._same(node, node.args[0])
        if not _plain(node) or node in self.constants:
            return False
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if first is None or node.kwargs.keys() - {"memory_format"}:
            return False
        if target is aten.convolution.default:
            return self._convolution(node)
        if target in (aten.addmm.default, aten.mm.default):
            return self._linear(node)
        if target is aten.add.Tensor:
            return self._sum(node)
        if first not in self.values:
            return False
        if target in _ACTIVATIONS:
            return self._activate(node, first, _ACTIVATIONS[target])
        if target is aten.hardtanh.default:
            return node.args[1:] == (0.0, 6.0) and self._activate(node, first, "relu6")
        if target in _ALIASES:
            return self._fits(shape_of(node), self.values[first]) and self._same(node, first)
        if target is aten._native_batch_norm_legit_no_training.default:
            return self._batch_norm(node, first)
        if target is aten.max_pool2d_with_indices.default:
            return self._max_pool(node, first)
        if target is aten.mean.dim:
            return self._average(node, first)
        return False

    def _same(self, node: fx.Node, first: fx.Node) -> bool:
        self._alias(node, self.values[first])
        return True

    @staticmethod
    def _fits(shape: tuple[int, ...], value: Value) -> bool:
        """Returns whether such a tensor holds the value's numbers in the same order, with channels on one axis."""
        if value.shape == shape:
            return True
        if value.size != (1, 1):
            plain = (value.images, value.channels, *value.size)
            return value.size[0] == 1 and shape in (plain, (*plain[:2], plain[3]))
        while len(shape) > 2 and shape[-1] == 1 and shape[-1] != value.channels:
            shape = shape[:-1]
        return len(shape) > 1 and shape[-1] == value.channels and math.prod(shape[:-1]) == value.images

    def _input(self, node: fx.Node, extent: tuple[int, int, tuple[int, int]]) -> Value:
        """Returns the value of a layer's input, in a segment with the same number of images."""
        value = self.values.get(node)
        if value is not None and (value.images, value.channels, value.size) != extent:
            self._close()
        self._open(extent[0])
        return self._enter(node, extent)

    def _layer(self, node: fx.Node, source: Value, spec: Spec, weight: Tensor, bias: Tensor | None, name: str) -> None:
        out = Value(source.images, spec.out_channels, spec.output_size(source.size), shape_of(node))
        weight = weight.reshape(spec.weight_shape)
        layer = Convolution(out, [source], name=name, spec=spec, weight=weight, bias=bias)
        self.stages.layers[layer] = node
        self._add(node, layer)

    def _convolution(self, node: fx.Node) -> bool:
        x, w, b, stride, padding, dilation, transposed, _, groups = node.args
        if transposed or w not in self.constants or not _plain(w) or not (b is None or b in self.constants):
            return False
        shape, kernel = shape_of(x), shape_of(w)
        if len(shape) not in (3, 4) or len(kernel) != len(shape) or 0 in shape or not _plain(x):
            return False

        def pair(numbers: list[int], first: int) -> tuple[int, int]:
            numbers = numbers * (len(shape) - 2) if len(numbers) == 1 else numbers
            return (first, *numbers) if len(numbers) == 1 else tuple(numbers)

        spec = Spec(
            in_channels=shape[1],
            out_channels=kernel[0],
            kernel=pair(list(kernel[2:]), 1),
            stride=pair(stride, 1),
            padding=pair(padding, 0),
            dilation=pair(dilation, 1),
            groups=groups,
        )
        source = self._input(x, _extent(shape))
        bias = None if b is None else self.constants[b]
        self._layer(node, source, spec, self.constants[w], bias, self.name_of(w, node))
        return True

    def _linear(self, node: fx.Node) -> bool:
        b, x, w = node.args if node.target is aten.addmm.default else (None, *node.args)
        if w not in self.constants or not _plain(w) or not _plain(x) or not (b is None or b in self.constants):
            return False
        if b is not None and shape_of(b) != shape_of(w)[1:]:
            return False
        inputs, outputs = shape_of(w)
        source = self._input(x, (shape_of(x)[0], inputs, (1, 1)))
        spec = Spec(in_channels=inputs, out_channels=outputs)
        bias = None if b is None else self.constants[b]
        self._layer(node, source, spec, self.constants[w].t(), bias, self.name_of(w, node))
        return True

    def name_of(self, weight: fx.Node, node: fx.Node) -> str:
        """Returns the name of the module that has this weight."""
        while weight not in self.weight_names and len(weight.all_input_nodes) > 0:
            weight = weight.all_input_nodes[0]
        name = self.weight_names.get(weight, node.name)
        return name.removesuffix(".weight")

    def _fusible(self, node: fx.Node) -> Step | None:
        """Returns the step that made `node`'s result, if nothing else reads it and no activation is fused yet."""
        while True:
            value = self.values.get(node)
            if value is None or len(node.users) != 1:
                return None
            step, names = self.maker[value], self.names[value]
            if names[0] is node:
                return step if isinstance(step, Convolution | Add) and not step.activation else None
            node = names[names.index(node) - 1]

    def _activate(self, node: fx.Node, first: fx.Node, activation: str) -> bool:
        step, value = self._fusible(first), self.values[first]
        if step is not None:
            step.activation = activation
            self._alias(node, value)
        else:
            out = Value(value.images, value.channels, value.size, shape_of(node))
            self._add(node, Add(out, [value], activation=activation))
        return True

    def _sum(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or not all(isinstance(a, fx.Node) and _plain(a) for a in node.args):
            return False
        a, b = node.args
        known = self.values.get(a) or self.values.get(b)
        if shape_of(a) != shape_of(b) or known is None or a in self.constants or b in self.constants:
            return False
        extent = (known.images, known.channels, known.size)
        if not all(self._holds(n, extent) for n in (a, b)):
            return False
        left, right = self._enter(a, extent), self._enter(b, extent)
        order = {id(s): i for i, s in enumerate(self.segment.steps)}
        makers = [(order[id(self.maker[v])], n, v, o) for n, v, o in ((a, left, right), (b, right, left))]
        _, later, value, other = max(makers, key=lambda m: m[0])
        step = self._fusible(later)
        if isinstance(step, Convolution) and len(step.inputs) == 1 and value is not other:
            step.inputs.append(other)
            self._alias(node, value)
        else:
            self._add(node, Add(Value(left.images, left.channels, left.size, shape_of(node)), [left, right]))
        return True

    def _holds(self, node: fx.Node, extent: tuple[int, int, tuple[int, int]]) -> bool:
        """Returns whether a node's tensor is laid out as a value of this extent."""
        value = self.values.get(node)
        if value is not None:
            return (value.images, value.channels, value.size) == extent
        return self._fits(shape_of(node), Value(*extent, (*extent[:2], *extent[2])))

    def _batch_norm(self, node: fx.Node, first: fx.Node) -> bool:
        _, w, b, mean, var, _, eps = node.args
        value = self.values[first]
        parts = [n for n in (w, b, mean, var) if n is not None]
        if not all(n in self.constants and _plain(n) for n in parts):
            return False
        if _extent(shape_of(first)) != (value.images, value.channels, value.size):
            return False
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            return False
        scale = torch.rsqrt(self.constants[var] + eps)
        if w is not None:
            scale = scale * self.constants[w]
        shift = -self.constants[mean] * scale
        if b is not None:
            shift = shift + self.constants[b]
        step = self._fusible(first)
        if isinstance(step, Convolution) and len(step.inputs) == 1:
            step.weight = step.weight * scale[:, None, None, None]
            step.bias = shift if step.bias is None else step.bias * scale + shift
            self._alias(node, value)
        else:
            channels = value.channels
            spec = Spec(in_channels=channels, out_channels=channels, groups=channels)
            self._layer(node, value, spec, scale, shift, self.name_of(w if w is not None else mean, node))
        return True

    def _max_pool(self, node: fx.Node, first: fx.Node) -> bool:
        kernel, stride, padding, dilation, ceil = [*node.args[1:], *((), 0, 1, False)[len(node.args) - 2 :]]
        value, shape = self.values[first], shape_of(node)
        used = any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users)
        if used or ceil or _pair(dilation) != (1, 1) or len(shape_of(first)) != 4:
            return False
        if shape_of(first) != (value.images, value.channels, *value.size):
            return False
        out = Value(value.images, value.channels, (shape[2], shape[3]), shape)
        window = {"kernel": kernel, "stride": stride or kernel, "padding": padding}
        self._add(node, MaxPool(out, [value], **{k: _pair(v) for k, v in window.items()}))
        return True

    def _average(self, node: fx.Node, first: fx.Node) -> bool:
        value, dims = self.values[first], node.args[1]
        if shape_of(first) != (value.images, value.channels, *value.size) or not isinstance(dims, list | tuple):
            return False
        if sorted(d % 4 for d in dims) != [2, 3]:
            return False
        self._add(node, AvgPool(Value(value.images, value.channels, (1, 1), shape_of(node)), [value]))
        return True


def val_of(node: fx.Node) -> object:
    """Returns the fake tensor that describes a node's result, or the first one of several results."""
    val = node.meta.get("val")
    return val[0] if isinstance(val, list | tuple) and val else val


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Returns the shape of a node's result."""
    return tuple(val_of(node).shape)


def _plain(node: fx.Node) -> bool:
    """Returns whether a node's result is a float32 tensor on the CPU that has a known shape and is not empty."""
    val = val_of(node)
    if not isinstance(val, Tensor) or val.dtype != torch.float32 or val.device.type != "cpu":
        return False
    return val.layout == torch.strided and all(type(n) is int and n > 0 for n in val.shape)


def _extent(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, int]]:
    """Returns images, channels and (height, width) of a tensor of this shape, whose second axis holds the channels."""
    if len(shape) == 2:
        return shape[0], shape[1], (1, 1)
    return shape[0], shape[1], (1, shape[2]) if len(shape) == 3 else (shape[2], shape[3])


def _pair(value: int | list[int]) -> tuple[int, ...]:
    value = (value, value) if isinstance(value, int) else tuple(value)
    return value * 2 if len(value) == 1 else value


def tensors_of(value: object) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []


def arguments_of(example: object) -> tuple[tuple, dict[str, object]]:
    """Returns the positional and the keyword arguments that example inputs stand for.

    Raises:
        TypeError: if they are not a tensor, tuple, list or mapping.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    if not isinstance(example, Tensor | list | tuple):
        raise TypeError(
            f"example_inputs is {described(example)}: a tensor is needed, a tuple or list of the positional "
            "arguments, or a mapping of the keyword arguments"
        )
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}
