"""A traced model's plan, and running it: torch nodes one by one, segments in one native call each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from granet.engine.graph import Stages
from granet.engine.program import Program, Segment

Arenas = dict[Segment, list[Tensor]]


@dataclass(frozen=True)
class Plan:
    """A compiled model: its stages and the program of each segment."""

    stages: Stages
    programs: dict[Segment, Program]


def execute(stages: Stages, programs: dict[Segment, Program], inputs: Sequence[object], arenas: Arenas) -> object:
    """The model's output. `arenas` keeps working memory between calls; two threads never hold the same."""
    values: dict[fx.Node, object] = {}
    interpreter = fx.Interpreter(stages.graph, garbage_collect_values=False)
    arguments = iter(inputs)

    def lookup(node: fx.Node) -> object:
        return values[node]

    for item in stages.order:
        if not isinstance(item, fx.Node):
            program = programs[item]
            pool = arenas.setdefault(item, [])
            try:
                arena = pool.pop()
            except IndexError:
                arena = program.arena()
            found = program.run([values[s.key] for s in program.inputs], arena)
            pool.append(arena)
            for tensor, nodes in zip(found, stages.results.get(item, []), strict=True):
                for node in nodes:
                    shape = node.meta["tensor_meta"].shape
                    values[node] = tensor.view(shape)
        elif item.op == "placeholder":
            values[item] = next(arguments, item.args[0] if item.args else None)
        elif item.op == "output":
            return fx.map_arg(item.args[0], lookup)
        else:
            args, kwargs = fx.map_arg(item.args, lookup), fx.map_arg(item.kwargs, lookup)
            values[item] = getattr(interpreter, item.op)(item.target, args, kwargs)
    raise AssertionError("a traced model ends with an output")
