"""Programs in files: the calls of torch's operators around the segments, and how they run without the model's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor, fx

from granet.engine.runtime import SegmentRunner
from granet.engine.saved import segments
from granet.engine.saved.forms import DTYPES, NAMES
from granet.engine.saved.operators import OPERATORS, name_of
from granet.engine.saved.records import AnyNode, ArgumentNode, CallNode, SegmentNode, TensorNode
from granet.names import unknown

FORMATS = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
}
_FORMAT_NAMES = {form: name for name, form in FORMATS.items()}


@dataclass(frozen=True)
class Node:
    """The place of a node's result among the arguments of a later one."""

    number: int


def stored(
    module: fx.GraphModule, given: Sequence[int | Tensor], add: Callable[[str, Tensor], None]
) -> tuple[list[AnyNode], tuple[int, ...]]:
    """Returns the nodes of a packed graph, and the numbers of its results.

    Args:
        module: the graph, as `granet.engine.runtime.build` makes it.
        given: for each argument, the number of the caller's tensor, or a tensor that belongs to the model.
        add: called with the name and the tensor for each tensor that is to be stored.

    Raises:
        ValueError: if a file cannot hold the graph.
    """
    nodes: list[AnyNode] = []
    numbers: dict[fx.Node, int] = {}
    results: tuple[int, ...] = ()
    places = iter(given)

    def tensor(found: Tensor) -> TensorNode:
        if found.dtype not in NAMES or found.layout != torch.strided or found.device.type != "cpu":
            raise ValueError(f"it has a tensor of {found.dtype}, {found.layout}, on {found.device}")
        stride = None if found.is_contiguous() else tuple(found.stride())
        segments.check_stride(tuple(found.shape), stride)
        add(f"{len(nodes)}.tensor", found)
        return TensorNode(stride=stride)

    for node in module.graph.nodes:
        if node.op == "placeholder":
            place = next(places)
            if not node.users:
                continue
            made = ArgumentNode(number=place) if isinstance(place, int) else tensor(place)
        elif node.op == "get_attr":
            found = getattr(module, node.target)
            if not isinstance(found, Tensor):
                raise ValueError("it has a branch inside of its graph")
            made = tensor(found)
        elif node.op == "call_module":
            runner = getattr(module, node.target)
            inputs = tuple(numbers[n] for n in node.args)
            prefix = len(nodes)
            made = segments.stored(runner, inputs, lambda name, t, prefix=prefix: add(f"{prefix}.{name}", t))
        elif node.op == "call_function":
            args = [_stored_argument(a, numbers) for a in node.args]
            kwargs = {name: _stored_argument(a, numbers) for name, a in node.kwargs.items()}
            made = CallNode(name=name_of(node.target), args=args, kwargs=kwargs)
        else:
            found = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
            if not all(isinstance(n, fx.Node) for n in found):
                raise ValueError("it returns something besides tensors")
            results = tuple(numbers[n] for n in found)
            continue
        numbers[node] = len(nodes)
        nodes.append(made)
    return nodes, results


def _stored_argument(value: object, numbers: Mapping[fx.Node, int]) -> JsonValue:
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_stored_argument(item, numbers) for item in value]
    if value in NAMES:
        return {"dtype": NAMES[value]}
    if value in _FORMAT_NAMES:
        return {"memory_format": _FORMAT_NAMES[value]}
    if value == torch.strided or value == torch.device("cpu"):
        return {"default": "layout" if value == torch.strided else "device"}
    raise ValueError(f"it passes {value!r} to an operator, which a file cannot hold")


def _argument(form: JsonValue, before: int) -> object:
    """Returns an argument of a call. The inverse of `_stored_argument`, with a `Node` for the result of a node."""
    if isinstance(form, list):
        return [_argument(item, before) for item in form]
    if not isinstance(form, dict):
        return form
    match form:
        case {"node": int(number)} if 0 <= number < before:
            return Node(number)
        case {"node": number}:
            raise ValueError(f"it refers to node {number}, and there are {before} before it")
        case {"dtype": str(name)} if name in DTYPES:
            return DTYPES[name]
        case {"memory_format": str(name)} if name in FORMATS:
            return FORMATS[name]
        case {"default": "layout"}:
            return torch.strided
        case {"default": "device"}:
            return torch.device("cpu")
    raise ValueError(f"{str(form)[:80]} is no argument")


Operation = Callable[..., object]


class StoredProgram:
    """A program that runs what a file says. Call it with the tensors of a call; it returns the tensors of the output.

    Args:
        nodes: the records.
        results: the numbers of the nodes whose results are returned.
        arguments: how many tensors a caller passes.
        tensors: the program's tensors, by name.

    Raises:
        ValueError: if something in the records is impossible.
    """

    def __init__(self, nodes: Sequence[AnyNode], results: Sequence[int], arguments: int, tensors: Mapping[str, Tensor]):
        self._steps: list[tuple[int, Operation, list, dict, list[int]]] = []
        self._begin: list[object] = [None] * len(nodes)
        self._arguments: list[tuple[int, int]] = []
        self._results = list(results)
        for i, node in enumerate(nodes):
            try:
                self._take(i, node, arguments, tensors)
            except ValueError as error:
                raise ValueError(f"node {i}, {node.op}: {error}") from None
        if any(number >= len(nodes) for number in results):
            raise ValueError(f"it returns the result of node {max(results)}, and there are {len(nodes)}")
        self._free()

    def _take(self, i: int, node: AnyNode, arguments: int, tensors: Mapping[str, Tensor]) -> None:
        if isinstance(node, ArgumentNode):
            if node.number >= arguments:
                raise ValueError(f"it is tensor {node.number} of a call with {arguments} tensors")
            self._arguments.append((i, node.number))
        elif isinstance(node, TensorNode):
            self._begin[i] = _tensor(node, f"{i}.tensor", tensors)
        elif isinstance(node, SegmentNode):
            if any(number >= i for number in node.inputs):
                raise ValueError(f"it refers to node {max(node.inputs)}, and there are {i} before it")
            own = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            self._steps.append((i, segments.restored(node, own), [Node(n) for n in node.inputs], {}, []))
        elif isinstance(node, CallNode):
            if node.name not in OPERATORS:
                raise ValueError(unknown("operator", node.name[:80], OPERATORS))
            args = [_argument(form, i) for form in node.args]
            kwargs = {name: _argument(form, i) for name, form in node.kwargs.items()}
            self._steps.append((i, OPERATORS[node.name], args, kwargs, []))

    def _free(self) -> None:
        """Notes after which step each result is no longer needed."""
        last: dict[int, list[int]] = {}
        for number, _, args, kwargs, frees in self._steps:
            last[number] = frees
            for used in _nodes([args, list(kwargs.values())]):
                last[used] = frees
        for number, frees in last.items():
            if number not in self._results and self._begin[number] is None:
                frees.append(number)

    @property
    def runners(self) -> list[SegmentRunner]:
        """The segments, in order."""
        return [step[1] for step in self._steps if isinstance(step[1], SegmentRunner)]

    def __call__(self, arguments: Sequence[Tensor]) -> list[object]:
        """Returns the results."""
        found = list(self._begin)
        for place, number in self._arguments:
            found[place] = arguments[number]
        for number, operation, args, kwargs, frees in self._steps:
            named = {name: _filled(arg, found) for name, arg in kwargs.items()}
            found[number] = operation(*[_filled(arg, found) for arg in args], **named)
            for unused in frees:
                found[unused] = None
        return [found[number] for number in self._results]


def _tensor(node: TensorNode, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"its tensor {name} is missing")
    tensor = tensors[name]
    if node.stride is None:
        return tensor
    segments.check_stride(tuple(tensor.shape), node.stride)
    return torch.empty_strided(tensor.shape, node.stride, dtype=tensor.dtype).copy_(tensor)


def _filled(argument: object, found: Sequence[object]) -> object:
    if isinstance(argument, Node):
        return found[argument.number]
    return [_filled(item, found) for item in argument] if isinstance(argument, list) else argument


def _nodes(argument: object) -> list[int]:
    if isinstance(argument, Node):
        return [argument.number]
    return [n for item in argument for n in _nodes(item)] if isinstance(argument, list) else []
