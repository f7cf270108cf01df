"""Saved programs whose files were changed at random: they are refused, or they run within their memory.

`python tests/engine/fuzz_saved.py SEEDS`; run as a program under the sanitizers. `archived` also makes files for tests.
"""

import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fuzz_models import network
from torch import Tensor, nn

from granet.engine import ops
from granet.engine.capture import Part, trace
from granet.engine.program import KernelChoice, Program, kernel_choices
from granet.engine.quantise import Ranges, formats_of, reduced
from granet.engine.report import InferenceReport
from granet.engine.runtime import build
from granet.engine.saved import archive, forms, programs, records
from granet.engine.saved.archive import CompiledFileError
from granet.engine.saved.model import LoadedModel, isa
from granet.engine.steps import Convolution

PATH = Path("somewhere.granet")


Traced = tuple[Part, tuple[object, ...]]


def archived(
    traced: Traced, x: Tensor, precision: str = "float32", batch: int = 1, block: bool = False
) -> tuple[bytes, Callable[[Tensor], list[Tensor]]]:
    """The content of a file with a model's program, made without measuring anything, and the program itself."""
    part, args = traced
    with torch.no_grad():
        stages, _ = part.stages(args)
        if precision != "float32":
            ranges = Ranges(part.module, list(part.module.graph.nodes))
            ranges.see(args)
            stages = reduced(stages, precision, formats_of(stages, ranges))

        def choose(layer: Convolution) -> KernelChoice:
            choices = kernel_choices(layer, batch)
            return next((c for c in choices if block and c.kind == "block"), choices[0])

        fast = build(stages, {segment: Program(segment, choose, batch) for segment in stages.segments})
    tensors: dict[str, Tensor] = {}
    given = [0 if value is x else value for value in args]
    nodes, results = programs.stored(fast, given, lambda name, t: tensors.__setitem__(f"0.{name}", t))
    report = InferenceReport((), 1.0, 1.0, "sparse", "", 0.0)
    program = records.ProgramRecord(
        inputs=forms.encoded(((x,), {}), forms.described_tensor),
        nodes=tuple(nodes),
        results=results,
        output={"list": [{"result": i} for i in range(len(results))]},
        report=report,
    )
    header = records.Header(format=records.FORMAT, granet="0", torch="0", isa=isa(), threads=2, programs=(program,))
    place = next(i for i, value in enumerate(given) if value is not args[i])

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(fast(*args[:place], x, *args[place + 1 :]))

    return archive.to_bytes(header, tensors), run


def loaded(content: bytes) -> LoadedModel:
    """The model in a file's content."""
    return LoadedModel(*archive.parse(content, PATH), PATH)


def opened(content: bytes) -> tuple[dict, dict[str, Tensor]]:
    """The header of a file as JSON, and its tensors."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])["__metadata__"][archive.KEY]
    return json.loads(header), archive.safetensors.torch.load(content)


def closed(header: dict, tensors: dict[str, Tensor]) -> bytes:
    """The content of a file with this header and these tensors."""
    return archive.safetensors.torch.save(tensors, {archive.KEY: json.dumps(header)})


def numbers_in(value: object) -> list[tuple[list | dict, int | str]]:
    """The places of all whole numbers in a nest of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in items:
        found += [(value, key)] if type(item) is int else numbers_in(item)
    return found


def change(header: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    """Changes a number in the header, or some in a tensor."""
    if dice.random() < 0.5:
        holder, key = dice.choice(numbers_in(header["programs"][0]["nodes"]))
        holder[key] = dice.choice([holder[key] + dice.choice([-1, 1, 2]), 0, 1, 7, 64, 2**20, 2**31 - 1])
        return
    name = dice.choice([name for name, t in tensors.items() if t.numel()])
    tensor = tensors[name] = tensors[name].clone()
    place = dice.randrange(tensor.numel())
    if dice.random() < 0.2:
        tensors[name] = tensor[:-1].clone() if dice.random() < 0.5 else torch.cat([tensor, tensor[:1]])
    elif tensor.dtype == torch.int32:
        tensor[place] = int(tensor[place]) + dice.choice([-1, 1, 4, -64, 64, 10**4, -(10**4), 10**8])
    else:
        tensor[place] = dice.choice([float("nan"), float("inf"), 0.0, 1e30])


def check_changes(seed: int, changes: int) -> tuple[int, int]:
    """Returns how many changed files were refused, and how many ran."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    x = torch.randn([1, 5, 17][seed % 3], 3, 24, 24)
    activation = [nn.ReLU(), nn.ReLU6(), nn.SiLU()][seed % 3]
    refused = ran = 0
    (traced,) = trace(network(activation, 0.4), x)
    for precision, batch in (("float32", 1), ("float32", ops.cpu()[0]), ("bfloat16", 1), ("int8", 1)):
        header, tensors = opened(archived(traced, x, precision, batch, block=bool(seed % 2))[0])
        for _ in range(changes):
            own, own_tensors = copy.deepcopy(header), dict(tensors)
            change(own, own_tensors, dice)
            try:
                found = loaded(closed(own, own_tensors))
            except CompiledFileError:
                refused += 1
                continue
            try:
                found(x)
            except (RuntimeError, IndexError, TypeError, ValueError):  # of torch's operators, or NaN in int8
                refused += 1
                continue
            ran += 1
    return refused, ran


if __name__ == "__main__":
    torch.set_num_threads(2)
    ops.prepare()
    for number in range(int(sys.argv[1])):
        print(number, check_changes(number, int(sys.argv[2])), flush=True)
