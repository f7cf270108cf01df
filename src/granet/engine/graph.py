"""From a traced model to stages: segments that the kernels run, and single nodes that torch runs."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from granet.engine.program import Add, AvgPool, Input, Layer, MaxPool, Segment, Step, Value
from granet.engine.spec import Spec, spec_of

_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
_ACTIVATION_CALLS = {
    F.relu: "relu",
    torch.relu: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
}
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FLATTENS = (torch.flatten, "flatten", "view", "reshape", torch.reshape)


@dataclass
class Stages:
    """A model in the order it runs: segments and torch nodes.

    Attributes:
        graph: the traced module.
        order: segments and fx nodes, alternating as they come.
        results: for each segment, the fx nodes whose results its outputs are, in order.
    """

    graph: fx.GraphModule
    order: list[Segment | fx.Node] = field(default_factory=list)
    results: dict[Segment, list[list[fx.Node]]] = field(default_factory=dict)

    @property
    def segments(self) -> list[Segment]:
        """The segments, in order."""
        return [s for s in self.order if isinstance(s, Segment)]


def lower(traced: fx.GraphModule, left_dense: frozenset[str] = frozenset()) -> Stages:
    """The stages of a traced model whose nodes carry tensor shapes (meta["tensor_meta"]).

    Args:
        traced: the model, in eval mode.
        left_dense: names of modules that torch must run.
    """
    return _Lowering(traced, left_dense).run()


class _Lowering:
    def __init__(self, traced: fx.GraphModule, left_dense: frozenset[str]):
        self.stages = Stages(traced)
        self.modules = dict(traced.named_modules())
        self.left_dense = left_dense
        self.segment: Segment | None = None
        self.values: dict[fx.Node, Value] = {}  # nodes whose result is inside the open segment
        self.maker: dict[Value, Step] = {}
        self.names: dict[Value, list[fx.Node]] = {}

    def run(self) -> Stages:
        for node in self.stages.graph.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output") or not self._take(node):
                if any(n in self.values for n in node.all_input_nodes):
                    self._close()
                self.stages.order.append(node)
        return self.stages

    # Segments

    def _close(self) -> None:
        segment, inside = self.segment, self.values
        if segment is None:
            return
        made = set(inside)
        for value, nodes in self.names.items():
            later = [n for n in nodes if any(user not in made for user in n.users)]
            if later and not isinstance(self.maker[value], Input):
                segment.outputs.append(value)
                self.stages.results.setdefault(segment, []).append(later)
        self.segment, self.values, self.maker, self.names = None, {}, {}, {}

    def _open(self, images: int) -> Segment:
        if self.segment is not None and self.segment.images != images:
            self._close()
        if self.segment is None:
            self.segment = Segment(images)
            self.stages.order.append(self.segment)
        return self.segment

    def _value(self, node: fx.Node) -> Value:
        """The value of a node's result inside the open segment, brought in as an input if it is not there yet."""
        if node not in self.values:
            shape = _shape(node)
            images, channels, size = _extent(shape)
            self._add(node, Input(Value(images, channels, size, shape), [], key=node))
        return self.values[node]

    def _add(self, node: fx.Node, step: Step) -> None:
        self.segment.steps.append(step)
        self.maker[step.out] = step
        self._alias(node, step.out)

    def _alias(self, node: fx.Node, value: Value) -> None:
        value.shape = _shape(node)
        self.values[node] = value
        self.names.setdefault(value, []).append(node)

    # Nodes

    def _take(self, node: fx.Node) -> bool:
        """True if the node became part of a segment."""
        shape = _shape(node)
        if shape is None or 0 in shape or node.meta["tensor_meta"].dtype != torch.float32:
            return False
        if node.op == "call_module":
            return self._take_module(node, self.modules[node.target])
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if first is None:
            return False
        if node.target in _ACTIVATION_CALLS:
            return self._activate(node, first, _ACTIVATION_CALLS[node.target])
        if node.target in _ADDS:
            return self._sum(node)
        if first not in self.values:
            return False
        value = self.values[first]
        if node.target in _FLATTENS and value.size == (1, 1) and len(shape) == 2 and shape[0] == value.images:
            self._alias(node, value)
            return True
        if node.target == "contiguous":
            self._alias(node, value)
            return True
        if node.target is F.adaptive_avg_pool2d and _pair(node.args[1]) == (1, 1):
            return self._average(node, first)
        if node.target in (torch.mean, "mean"):
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            spatial = isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]
            return len(_shape(first)) == 4 and spatial and self._average(node, first)
        return False

    def _take_module(self, node: fx.Node, module: nn.Module) -> bool:
        first = node.args[0]
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            return node.target not in self.left_dense and self._layer(node, first, module)
        activation = _ACTIVATION_MODULES.get(type(module))
        if activation:
            return self._activate(node, first, activation)
        if first not in self.values:
            return False
        value = self.values[first]
        if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d):
            self._alias(node, value)
            return True
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._batch_norm(node, first, module)
        if isinstance(module, nn.MaxPool2d):
            return self._max_pool(node, first, module)
        if isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) == (1, 1):
            return self._average(node, first)
        flattens = isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim in (-1, 3)
        if flattens and value.size == (1, 1) and len(_shape(first)) == 4:
            self._alias(node, value)
            return True
        return False

    def _layer(self, node: fx.Node, first: fx.Node, module: nn.Module) -> bool:
        try:
            spec = spec_of(module)
        except ValueError:
            return False
        shape = _shape(first)
        if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
            return False
        if (isinstance(module, nn.Conv2d) and len(shape) != 4) or (isinstance(module, nn.Conv1d) and len(shape) != 3):
            return False
        extent = _extent(shape, linear=isinstance(module, nn.Linear))
        images, value = extent[0], self.values.get(first)
        if value is not None and (value.images, value.channels, value.size) != extent:
            self._close()
        self._open(images)
        if isinstance(module, nn.Linear) and first not in self.values:
            count, channels, size = _extent(shape, linear=True)
            self._add(first, Input(Value(count, channels, size, shape), [], key=first))
            source = self.values[first]
        else:
            source = self._value(first)
        out_shape = _shape(node)
        value = Value(images, spec.out_channels, spec.output_size(source.size), out_shape)
        weight = module.weight.detach().reshape(spec.weight_shape)
        bias = None if module.bias is None else module.bias.detach()
        layer = Layer(value, [source], name=str(node.target), spec=spec, weight=weight, bias=bias)
        self._add(node, layer)
        return True

    def _fusible(self, node: fx.Node) -> Step | None:
        """The step that made `node`'s result, if nothing else reads it and nothing was fused after its sum."""
        if node not in self.values or len(node.users) != 1:
            return None
        step = self.maker[self.values[node]]
        return step if isinstance(step, Layer | Add) and not step.activation else None

    def _activate(self, node: fx.Node, first: fx.Node, activation: str) -> bool:
        if first not in self.values:
            return False
        step = self._fusible(first)
        value = self.values[first]
        if step is not None:
            step.activation = activation
            self._alias(node, value)
        else:
            out = Value(value.images, value.channels, value.size, _shape(node))
            self._add(node, Add(out, [value], activation=activation))
        return True

    def _sum(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            return False
        a, b = node.args
        if _shape(a) != _shape(b) or not (a in self.values or b in self.values):
            return False
        if (a not in self.values or b not in self.values) and len(_shape(a)) not in (2, 4):
            return False
        left, right = self._value(a), self._value(b)
        if (left.images, left.channels, left.size) != (right.images, right.channels, right.size):
            return False
        place = {id(s): i for i, s in enumerate(self.segment.steps)}
        makers = [(place[id(self.maker[v])], n, v, o) for n, v, o in ((a, left, right), (b, right, left))]
        _, name, value, other = max(makers, key=lambda m: m[0])
        step = self._fusible(name)
        if isinstance(step, Layer) and len(step.inputs) == 1 and value is not other:
            step.inputs.append(other)
            self._alias(node, value)
        else:
            self._add(node, Add(Value(left.images, left.channels, left.size, _shape(node)), [left, right]))
        return True

    def _batch_norm(self, node: fx.Node, first: fx.Node, module: nn.Module) -> bool:
        value = self.values[first]
        if module.running_mean is None or _extent(_shape(first)) != (value.images, value.channels, value.size):
            return False
        scale = torch.rsqrt(module.running_var.detach() + module.eps)
        if module.weight is not None:
            scale = scale * module.weight.detach()
        shift = -module.running_mean.detach() * scale
        if module.bias is not None:
            shift = shift + module.bias.detach()
        step = self._fusible(first)
        if isinstance(step, Layer) and len(step.inputs) == 1:
            step.weight = step.weight * scale[:, None, None, None]
            step.bias = shift if step.bias is None else step.bias * scale + shift
            self._alias(node, value)
        else:
            channels = value.channels
            spec = Spec(in_channels=channels, out_channels=channels, groups=channels)
            out = Value(value.images, channels, value.size, _shape(node))
            weight = scale.reshape(spec.weight_shape)
            self._add(node, Layer(out, [value], name=str(node.target), spec=spec, weight=weight, bias=shift))
        return True

    def _max_pool(self, node: fx.Node, first: fx.Node, module: nn.MaxPool2d) -> bool:
        if _pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices or len(_shape(first)) != 4:
            return False
        value, shape = self.values[first], _shape(node)
        out = Value(value.images, value.channels, (shape[2], shape[3]), shape)
        window = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
        self._add(node, MaxPool(out, [value], **{k: _pair(v) for k, v in window.items()}))
        return True

    def _average(self, node: fx.Node, first: fx.Node) -> bool:
        value = self.values[first]
        self._add(node, AvgPool(Value(value.images, value.channels, (1, 1), _shape(node)), [value]))
        return True


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def _extent(shape: tuple[int, ...], *, linear: bool = False) -> tuple[int, int, tuple[int, int]]:
    """Images, channels and (height, width) of a tensor of this shape; a linear layer's features are the last axis."""
    if linear or len(shape) == 2:
        count = 1
        for n in shape[:-1]:
            count *= n
        return count, shape[-1], (1, 1)
    return shape[0], shape[1], (1, shape[2]) if len(shape) == 3 else (shape[2], shape[3])


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []
