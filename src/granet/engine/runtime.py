"""Stages as a module that runs: a graph of torch operators in which each segment is one call of the kernels."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from granet.engine.graph import Stages, val_of
from granet.engine.program import Program
from granet.engine.steps import Segment

Form = tuple[tuple[int, ...], tuple[int, ...] | None]  # shape and stride of a tensor; None where it is contiguous


class SegmentRunner(nn.Module):
    """A module that runs one segment. Its results have the shapes and strides that torch's operators would give.

    Args:
        program: the segment, packed.
        forms: for each output, the forms of the results that hold its numbers.
    """

    def __init__(self, program: Program, forms: Sequence[Sequence[Form]]):
        super().__init__()
        self.program, self.forms = program, forms
        self._arenas: list[Tensor] = []  # working memory, kept between calls; two threads never use the same

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the segment's results, one for each node."""
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = self.program.arena()
        found = self.program.run(list(inputs), arena)
        self._arenas.append(arena)
        results = []
        for tensor, forms in zip(found, self.forms, strict=True):
            for shape, stride in forms:
                shaped = tensor.view(shape)
                if stride is not None:
                    shaped = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(shaped)
                results.append(shaped)
        return results


def build(stages: Stages, programs: dict[Segment, Program]) -> fx.GraphModule:
    """Returns a module that takes the arguments of the stages' graph and returns its results."""
    graph, made = fx.Graph(), {}
    root = nn.Module()
    for node in stages.graph.nodes:
        if node.op == "placeholder":
            made[node] = graph.node_copy(node, made.__getitem__)
    for item in stages.order:
        if isinstance(item, Segment):
            program, results = programs[item], stages.results[item]
            name = f"segment{len(root._modules)}"
            root.add_module(name, SegmentRunner(program, [list(map(_form, nodes)) for nodes in results]))
            found = graph.call_module(name, tuple(made[s.key] for s in program.inputs))
            for i, node in enumerate(n for nodes in results for n in nodes):
                made[node] = graph.call_function(operator.getitem, (found, i))
                if isinstance(node.meta["val"], list | tuple):  # of several results the first is the one that is used
                    made[node] = graph.call_function(alone, (made[node],))
        elif item.op == "get_attr":  # a constant that the model makes, or the graph of a branch
            name = f"constant{len(made)}"
            setattr(root, name, operator.attrgetter(item.target)(stages.graph.owning_module))
            made[item] = graph.get_attr(name)
        elif item.op != "placeholder":
            made[item] = graph.node_copy(item, made.__getitem__)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _random(node))
    return fx.GraphModule(root, graph)


def alone(tensor: Tensor) -> tuple[Tensor]:
    """Returns a tensor as the only one of several results."""
    return (tensor,)


def _form(node: fx.Node) -> Form:
    val = val_of(node)
    return tuple(val.shape), None if val.is_contiguous() else val.stride()


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or (
        node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    )
