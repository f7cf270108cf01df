"""A walk through a network's torch.fx graph that follows channels: additions, groups, batch norms, concatenations.

Each operator that is known here has a rule for the channels of its output. Where an operator is not known, the channels
that enter it are kept. Torch-Pruning's dependency graph also knows which channels belong together, but not what a
channel without weights emits (a batch norm's bias, through activations and padding), and this decides what may go.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from granet.shrinking.channels import Channels, Units

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Call:
    """One call of a convolution or a linear layer."""

    module: nn.Module
    inputs: Channels
    outputs: Tensor  # ids

    @property
    def padded(self) -> bool:
        """Whether zeros stand around the inputs, so that a constant is none at the border."""
        padding = getattr(self.module, "padding", 0)
        if getattr(self.module, "padding_mode", "zeros") != "zeros" or padding == "valid":
            return False
        if padding == "same":
            return any(size > 1 for size in self.module.kernel_size)
        return any(padding) if isinstance(padding, tuple) else bool(padding)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return getattr(self.module, "groups", 1)


@dataclass
class Found:
    """What a walk has found: units, the calls of layers, and the channels that batch norms scale."""

    units: Units = field(default_factory=Units)
    calls: list[Call] = field(default_factory=list)
    norms: list[tuple[nn.Module, Tensor]] = field(default_factory=list)


def walk(model: nn.Module, example: tuple[Tensor, ...]) -> Found:
    """Returns what is known of the channels of a model in evaluation mode.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # of many kinds
        raise ValueError(f"torch.fx cannot trace the model, so its channels cannot be followed: {error}") from error
    follower = _Follower(graph)
    with torch.no_grad():
        follower.run(*example)
    follower.pin_shared(model)
    return follower.found


class _Follower(fx.Interpreter):
    """Runs the graph on the example, for the shapes, and applies the rules."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.found = Found()
        self.channels: dict[fx.Node, Channels] = {}
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.touched: list[nn.Parameter] = []  # parameters that are used outside of their modules

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        known = [one for one in n.all_input_nodes if one in self.channels]
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        if n.op == "get_attr":
            if isinstance(result, nn.Parameter):
                self.touched.append(result)
            return result
        by_name = any(isinstance(value, fx.Node) for value in n.kwargs.values())
        made = self._rule(n)(self, n) if isinstance(result, Tensor) and not by_name and n.op != "output" else None
        if made is not None:
            self.channels[n] = made
        elif not self._reads_another_size(n):
            for one in known:
                self.found.units.pin(self.channels[one].ids)
        return result

    def pin_shared(self, model: nn.Module) -> None:
        """Keeps the channels of layers whose parameters others use as well, or whose weights are computed."""
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        shared = {key for key, count in owners.items() if count > 1} | {id(one) for one in self.touched}

        def kept(module: nn.Module) -> bool:
            own = module.parameters(recurse=False)
            return parametrize.is_parametrized(module) or any(id(one) in shared for one in own)

        for call in self.found.calls:
            if kept(call.module):
                self.found.units.pin(torch.cat([call.inputs.ids, call.outputs]))
        for module, ids in self.found.norms:
            if kept(module):
                self.found.units.pin(ids)

    def _rule(self, n: fx.Node) -> Callable[[_Follower, fx.Node], Channels | None]:
        if n.op == "call_module":
            return MODULES.get(type(self.fetch_attr(n.target)), _unknown)
        return FUNCTIONS.get(n.target, _unknown) if n.op in ("call_function", "call_method") else _unknown

    def _reads_another_size(self, n: fx.Node) -> bool:
        """Returns whether a node asks for the type, the batch size or another size but that of the channels."""
        first = n.args[0] if n.args else None
        if not isinstance(first, fx.Node) or first not in self.channels:
            return False
        axis, dims = self.channels[first].axis, len(self.shapes[first])
        if n.target in ("dim", "ndimension") or (n.target is getattr and n.args[1] in ("dtype", "device", "ndim")):
            return True
        if n.target == "size" and len(n.args) == 2:
            return isinstance(n.args[1], int) and n.args[1] % dims != axis
        if n.target == "size" or (n.target is getattr and n.args[1] == "shape"):
            users = [one for one in n.users if one.users]
            indices = [one.args[1] for one in users if one.target is operator.getitem]
            return len(indices) == len(users) and all(isinstance(i, int) and i % dims != axis for i in indices)
        return False


def _unknown(at: _Follower, n: fx.Node) -> None:
    return None


def _first(at: _Follower, n: fx.Node) -> Channels | None:
    return at.channels.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None


def _entering(at: _Follower, n: fx.Node, axis: int, count: int) -> Channels | None:
    """Returns the channels that enter a layer on `axis`; if nothing is known of them, they are kept."""
    known = _first(at, n)
    if known is None:
        ids = at.found.units.new(count)
        at.found.units.pin(ids)
        return Channels(axis, ids, torch.full((count,), torch.nan, dtype=torch.float64))
    return known if known.axis == axis else None


def _layer(at: _Follower, n: fx.Node) -> Channels | None:
    """A convolution or a linear layer: new channels, or those of its groups, which stay together."""
    module, units = at.fetch_attr(n.target), at.found.units
    if len(n.all_input_nodes) != 1 or "weight" not in dict(module.named_parameters(recurse=False)):
        return None  # torch.nn.utils.prune, say, computes the weight anew at each call
    convolves = isinstance(module, CONVOLUTIONS)
    outputs, inputs = (module.out_channels, module.in_channels) if convolves else module.weight.shape
    axis = 1 if convolves and len(at.shapes[n]) == module.weight.dim() else len(at.shapes[n]) - 1
    if convolves and axis != 1:
        return None  # an image without a batch
    entering = _entering(at, n, axis, inputs)
    if entering is None:
        return None
    call = Call(module, entering, units.new(outputs))
    for earlier in (one for one in at.found.calls if one.module is module):
        units.join(earlier.inputs.ids, entering.ids)
        units.join(earlier.outputs, call.outputs)
        # one bias serves all calls, so only what is the same in all of them can go into it
        earlier.inputs = call.inputs = entering.agreeing_with(earlier.inputs)
    if call.groups > 1:
        for inside, outside in zip(entering.ids.chunk(call.groups), call.outputs.chunk(call.groups), strict=True):
            together = torch.cat([inside, outside])
            units.join(together[1:], together[:-1])
    at.found.calls.append(call)
    weight = module.weight.detach().double().reshape(call.groups, outputs // call.groups, inputs // call.groups, -1)
    values = entering.values.reshape(call.groups, 1, -1)  # those of this call
    unclear = values.isnan() | ((values != 0) & call.padded)
    varying = ((weight != 0).any(3) & unclear).any(2).flatten()
    constant = (weight.sum(3) * values.masked_fill(unclear, 0)).sum(2).flatten()
    if module.bias is not None:
        constant = constant + module.bias.detach().double()
    return Channels(axis, call.outputs, constant.masked_fill(varying, torch.nan))


def _norm(at: _Follower, n: fx.Node) -> Channels | None:
    module, known = at.fetch_attr(n.target), _first(at, n)
    if known is None or known.axis != 1 or module.running_mean is None or module.running_var is None:
        return None
    for ids in (ids for earlier, ids in at.found.norms if earlier is module):
        at.found.units.join(ids, known.ids)
    at.found.norms.append((module, known.ids))
    scale = (module.running_var.double() + module.eps).rsqrt()
    values = (known.values - module.running_mean.double()) * scale
    if module.affine:
        values = values * module.weight.detach().double() + module.bias.detach().double()
    return known.with_values(values)


def _same(at: _Follower, n: fx.Node) -> Channels | None:
    """Values pass as they are."""
    return _first(at, n)


def _zeros(at: _Follower, n: fx.Node) -> Channels | None:
    """Zeros pass, other constants may change, perhaps not everywhere alike."""
    known = _first(at, n)
    return known and known.zeros_only()


def _pointwise(at: _Follower, n: fx.Node) -> Channels | None:
    """Applied to each number by itself."""
    known = _first(at, n)
    if known is None or len(n.all_input_nodes) != 1:
        return None
    values = known.values.clone()
    if n.op == "call_module":
        return known.with_values(at.fetch_attr(n.target)(values))
    call = getattr(Tensor, n.target) if n.op == "call_method" else n.target
    return known.with_values(call(values, *n.args[1:], **n.kwargs))


def _binary(at: _Follower, n: fx.Node) -> Channels | None:
    """Sum, difference, product or quotient: with a number, or of two activations whose channels belong together."""
    nodes = [one for one in n.args[:2] if isinstance(one, fx.Node)]
    if n.kwargs or len(n.args) != 2:
        return None
    call = getattr(torch, n.target) if n.op == "call_method" else _PLAIN.get(n.target, n.target)
    if len(nodes) == 1:
        known = at.channels.get(nodes[0])
        numbers = all(isinstance(one, int | float | fx.Node) for one in n.args)
        if known is None or not numbers:
            return None
        return known.with_values(call(*(known.values if one is nodes[0] else one for one in n.args)))
    a, b = (at.channels.get(node) for node in nodes)
    if a is None or b is None or a.axis != b.axis or len(a) != len(b):
        return None
    if len(at.shapes[nodes[0]]) != len(at.shapes[nodes[1]]):
        return None
    at.found.units.join(a.ids, b.ids)
    values = call(a.values, b.values)
    if call in (operator.mul, torch.mul):
        values = values.masked_fill((a.values == 0) | (b.values == 0), 0)
    return Channels(a.axis, a.ids, values)


def _concatenated(at: _Follower, n: fx.Node) -> Channels | None:
    axis = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else 0)
    parts = [at.channels.get(node) for node in n.args[0]] if n.args else []
    if not parts or not isinstance(axis, int) or any(part is None or part.axis != parts[0].axis for part in parts):
        return None
    if axis % len(at.shapes[n]) != parts[0].axis:
        return None
    return Channels(parts[0].axis, torch.cat([part.ids for part in parts]), torch.cat([part.values for part in parts]))


def _flattened(at: _Follower, n: fx.Node) -> Channels | None:
    known = _first(at, n)
    if n.op == "call_module":
        module = at.fetch_attr(n.target)
        start, end = module.start_dim, module.end_dim
    else:
        start, end = (*n.args[1:], *n.kwargs.values(), -1)[:2] if len(n.args) + len(n.kwargs) > 1 else (0, -1)
    if known is None or known.axis != 1 or (start, end) not in ((1, -1), (1, len(at.shapes[n.args[0]]) - 1)):
        return None
    return known.repeated(at.shapes[n.args[0]][2:].numel())


def _viewed(at: _Follower, n: fx.Node) -> Channels | None:
    """A view as a matrix whose width is left open; a width that is written in the code would no longer be true."""
    known, sizes = _first(at, n), n.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if known is None or known.axis != 1 or len(sizes) != 2 or sizes[1] != -1:
        return None
    before = at.shapes[n.args[0]]
    return known.repeated(before[2:].numel()) if at.shapes[n][0] == before[0] else None


def _averaged(at: _Follower, n: fx.Node) -> Channels | None:
    """A mean over axes behind that of the channels."""
    known = _first(at, n)
    axes = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None)
    axes = (axes,) if isinstance(axes, int) else axes
    if known is None or axes is None or not all(isinstance(axis, int) for axis in axes):
        return None
    return known if all(axis % len(at.shapes[n.args[0]]) > known.axis for axis in axes) else None


def _permuted(at: _Follower, n: fx.Node) -> Channels | None:
    known, order = _first(at, n), n.args[1:]
    order = order[0] if len(order) == 1 else order
    if known is None or not all(isinstance(axis, int) for axis in order):
        return None
    return known.at([axis % len(order) for axis in order].index(known.axis))


def _dropped(at: _Follower, n: fx.Node) -> Channels | None:
    """Dropout as a function, unless it drops even in evaluation mode."""
    training = n.kwargs.get("training", n.args[2] if len(n.args) > 2 else True)
    return None if training else _first(at, n)


def _table(*rows: tuple[Callable, str]) -> Iterator[tuple[Any, Callable]]:
    for rule, names in rows:
        for name in names.split():
            for home in (nn, F, torch, operator):
                if hasattr(home, name):
                    yield getattr(home, name), rule
            if hasattr(Tensor, name):
                yield name, rule


_PLAIN = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
_RULES = dict(
    _table(
        (_layer, "Conv1d Conv2d Conv3d Linear"),
        (_norm, "BatchNorm1d BatchNorm2d BatchNorm3d"),
        (_same, "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout contiguous clone"),
        (_same, "MaxPool1d MaxPool2d MaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"),
        (_same, "AdaptiveMaxPool1d AdaptiveMaxPool2d max_pool1d max_pool2d adaptive_avg_pool1d adaptive_avg_pool2d"),
        (_same, "adaptive_max_pool2d"),
        (_zeros, "AvgPool1d AvgPool2d AvgPool3d avg_pool2d Upsample interpolate ZeroPad2d"),
        (_pointwise, "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Hardswish Hardsigmoid Hardtanh"),
        (_pointwise, "Softplus relu relu6 leaky_relu elu gelu silu mish sigmoid tanh hardswish hardsigmoid hardtanh"),
        (_pointwise, "softplus relu_ sigmoid_ clamp neg abs exp"),
        (_binary, "add sub mul iadd isub imul truediv"),
        (_concatenated, "cat concat"),
        (_flattened, "Flatten flatten"),
        (_viewed, "view reshape"),
        (_averaged, "mean"),
        (_permuted, "permute"),
        (_dropped, "dropout dropout2d"),
    )
)
MODULES = FUNCTIONS = _RULES
