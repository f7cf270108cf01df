"""The encoding of a segment of steps for the native operator `run`, and the packing of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from granet.engine import encoding, ops
from granet.engine.encoding import ACTIVATIONS, KINDS
from granet.engine.geometry import LINE, Lanes, geometry, kernel_taps, least_lanes
from granet.engine.index import IndexStructure, forward_structure
from granet.engine.precision import FLOAT32, WordStructure
from granet.engine.reduced import applies_activation, from_int8, packed_words, sum_factors, to_int8
from granet.engine.spec import Spec
from granet.engine.steps import Add, AvgPool, Convert, Convolution, Input, MaxPool, Segment, Value

WORD_TILES = (8, 6, 4)  # lengths of tiles at reduced precision, in vectors
GROUP = 4  # output channels with the same positions of non-zeros, in the "block" kernel
WORTH_SHARING = 1.2  # of a group's weights at one position, how many must be active for that kernel to be measured


@dataclass(frozen=True)
class KernelChoice:
    """How one layer is computed: the kernel, and the number of vectors in a tile (0 for the largest of that kernel)."""

    kind: str
    vectors: int = 0


def kernel_choices(layer: Convolution, batch: int) -> list[KernelChoice]:
    """Returns the ways to compute `layer` that are worth measuring, the most promising first."""
    spec, source = layer.spec, layer.inputs[0]
    if source.format != FLOAT32:
        return [KernelChoice("words", vectors) for vectors in WORD_TILES if vectors <= ops.reduced_cpu()[1]]
    if (
        batch == 1 and spec.kernel == (1, 1) and spec.padding == (0, 0) and source.size == (1, 1)
    ):  # one number per plane
        return [KernelChoice("vector")]
    choices = [KernelChoice("sparse", 8), KernelChoice("sparse", 12)]
    if layer.spec.out_channels // layer.spec.groups % GROUP == 0:
        active = layer.weight.reshape(-1, GROUP, layer.weight[0].numel()) != 0
        shared = active.any(dim=1).sum()  # positions that at least one of the group's channels reads
        if active.sum() > WORTH_SHARING * shared:
            choices.append(KernelChoice("block"))
    return choices


PackedWeights = dict[tuple[Convolution, KernelChoice | str], tuple[IndexStructure | WordStructure, Any]]


class Program:
    """A segment encoded for the kernels, with its packed weights. Call `run` with the segment's input tensors.

    Args:
        segment: the steps.
        choose: returns how to compute a layer.
        batch: number of images that lie innermost in a plane: 1, or a multiple of the kernels' vector length.
        chain: whether consecutive 1x1 convolutions are computed together, tile by tile.
        kept: packed weights by layer and choice, shared by programs of the same segment and batch.
    """

    def __init__(
        self,
        segment: Segment,
        choose: Callable[[Convolution], KernelChoice],
        batch: int,
        *,
        chain: bool = True,
        kept: PackedWeights | None = None,
    ):
        self.segment = segment
        self.batch, self.chain = batch, chain
        self.constants: list[Tensor] = []
        self.layer_steps: dict[Convolution, list[int]] = {}
        self._shared: dict[tuple[int, ...], int] = {}
        self._lanes: dict[Value, Lanes] = {}
        self._split: dict[Convolution, Value] = {}
        self._assign_lanes()
        self._encode(choose, {} if kept is None else kept)

    def _assign_lanes(self) -> None:
        """Gives every value its lanes. Layers of stride 1 and sums need the same lanes for their inputs and outputs."""
        parent: dict[Value, Value] = {}

        def root(value: Value) -> Value:
            while parent.setdefault(value, value) is not value:
                value = parent[value]
            return value

        needs: list[tuple[Value, Spec, tuple[int, int]]] = []
        for step in self.segment.steps:
            if isinstance(step, Convolution):
                source = step.inputs[0]
                if step.spec.stride != (1, 1):
                    phases = len({phase for phase, _ in kernel_taps(step.spec)})
                    size = tuple(-(-n // s) for n, s in zip(source.size, step.spec.stride, strict=True))
                    channels = source.planes * phases * source.format.channels
                    source = self._split[step] = Value(source.images, channels, size, (), source.format)
                needs.append((step.out, step.spec, step.inputs[0].size))
                for other in (source, *step.inputs[1:]):
                    parent[root(other)] = root(step.out)
            elif isinstance(step, Add | Convert):
                for other in step.inputs:
                    parent[root(other)] = root(step.out)
            root(step.out)
        classes: dict[Value, tuple[list, set]] = {}
        for value in list(parent):
            classes.setdefault(root(value), ([], set()))[1].add(value.size)
        for value, spec, size in needs:
            classes[root(value)][0].append((spec, size))
        lanes = {r: least_lanes(layers, self.batch, tuple(sizes)) for r, (layers, sizes) in classes.items()}
        self._lanes = {value: lanes[root(value)] for value in parent}

    def _encode(
        self,
        choose: Callable[[Convolution], KernelChoice],
        kept: PackedWeights,
    ) -> None:
        steps: list[tuple[encoding.AnyStep, list[Value]]] = []
        slots: dict[Value, int] = {}

        def slot(value: Value) -> int:
            return slots.setdefault(value, len(slots))

        def emit(step: encoding.AnyStep, *values: Value) -> None:
            steps.append((step, list(values)))

        self.inputs = [s for s in self.segment.steps if isinstance(s, Input)]
        for step in self.segment.steps:
            out = slot(step.out)
            sources = [slot(v) for v in step.inputs]
            values = (step.out, *step.inputs)
            if isinstance(step, Input):
                only_phase = self._constant(torch.zeros(2, dtype=torch.int32), "only phase")
                number = self.inputs.index(step)
                emit(encoding.PackStep(number, out, step.out.channels, *step.out.size, only_phase), step.out)
            elif isinstance(step, Convolution):
                first = len(steps)
                self._encode_layer(step, choose(step), slot, emit, kept)
                self.layer_steps[step] = list(range(first, len(steps)))
            elif isinstance(step, MaxPool):
                windows = *step.kernel, *step.stride, *step.padding
                emit(encoding.MaxPoolStep(sources[0], out, *windows), *values)
            elif isinstance(step, AvgPool):
                emit(encoding.AvgPoolStep(sources[0], out, self._factors(from_int8(step.inputs[0]))), *values)
            elif isinstance(step, Convert):
                factors = to_int8(step.out) or from_int8(step.inputs[0])
                emit(encoding.ConvertStep(sources[0], out, self._factors(factors)), *values)
            else:
                other = sources[1] if len(sources) > 1 else -1
                factors = self._factors(sum_factors(step))
                emit(encoding.AddStep(sources[0], out, other, ACTIVATIONS[step.activation], factors), *values)
        for value in self.segment.outputs:
            dims = 2 if value.size == (1, 1) else 4
            emit(encoding.UnpackStep(slot(value), value.channels, *value.size, dims), value)
        links = self._links(steps) if self.chain else [0] * len(steps)
        offsets, self.arena_floats = self._allocate(steps, links)
        rows = []
        for value in slots:
            lanes, blocks = self._lanes[value], -(-value.images // self.batch)
            layout = (lanes.pitch, self.batch, lanes.front, lanes.plane)
            kind = (value.format.number, value.format.zero)
            extent = (value.images, *value.size)
            rows.append(encoding.SlotRow(offsets[value], value.planes, blocks, *extent, *layout, *kind))
        numbers = encoding.encode(rows, [step for step, _ in steps], links)
        self.program = torch.tensor(numbers, dtype=torch.int64)

    def _encode_layer(
        self,
        step: Convolution,
        choice: KernelChoice,
        slot: Callable[[Value], int],
        emit: Callable[..., None],
        kept: PackedWeights,
    ) -> None:
        spec, source = step.spec, step.inputs[0]
        width, longest, longest_block = ops.cpu()
        kind = choice.kind
        group = GROUP if kind == "block" else source.format.channels
        vectors = choice.vectors or (longest_block if kind == "block" else longest)
        lanes = self._lanes[step.out]
        layout = geometry(
            spec, source.images, source.size, vector=width, batch=self.batch, tile=vectors * width, lanes=lanes
        )
        chunks = torch.get_num_threads()
        while -(-spec.out_channels // group) % chunks:
            chunks -= 1
        if kind == "vector":
            chunks = 1
            # The kernel first gathers the numbers of all planes into a vector, so a plane is one float long.
            layout = geometry(spec, source.images, source.size, vector=width, lanes=Lanes(1, 0, 1), tile=width)
        blocks = 1 if kind == "vector" else None
        scale = factors = bias = -1
        if kind == "words":
            if (step, kind) not in kept:
                kept[step, kind] = packed_words(step, layout, chunks)
            structure, finish = kept[step, kind]
            value, blocks = structure.value, 1
            scale, bias, factors = (self._constant(numbers) for numbers in finish)
        else:
            if (step, choice) not in kept:
                structure = forward_structure(step.weight != 0, spec, layout, group=group, chunks=chunks, blocks=blocks)
                kept[step, choice] = structure, step.weight.reshape(-1)[structure.index.long()].float().contiguous()
            structure, value = kept[step, choice]
            blocks = structure.blocks
            bias = -1 if step.bias is None else self._constant(step.bias.float().contiguous())
        if step in self._split:
            split = self._split[step]
            phases = torch.tensor(layout.phases, dtype=torch.int32).reshape(-1)
            number = self._constant(phases, "phases", layout.phases)
            emit(encoding.SplitStep(slot(source), slot(split), number, *spec.stride), split, source)
            source = split
        ptr, ids, offset, values = (self._constant(t) for t in (structure.ptr, structure.id, structure.offset, value))
        conv = encoding.ConvStep(
            source=slot(source),
            out=slot(step.out),
            residual=slot(step.inputs[1]) if len(step.inputs) > 1 else -1,
            ptr=ptr,
            id=ids,
            offset=offset,
            value=values,
            bias=bias,
            keep=self._keep(step.out) if lanes.front and kind != "vector" else -1,
            chunks=structure.chunks,
            blocks=blocks,
            activation=ACTIVATIONS[step.activation] if kind != "words" or applies_activation(step) else 0,
            kind=KINDS[kind],
            tile=vectors * width,
            scale=scale,
            factors=factors,
        )
        emit(conv, step.out, source, *step.inputs[1:])

    def _factors(self, numbers: tuple[float, ...] | None) -> int:
        return -1 if numbers is None else self._constant(torch.tensor(numbers, dtype=torch.float32), "factors", numbers)

    def _keep(self, value: Value) -> int:
        """Returns the number of the constant that is -1 at an image's positions, and 0 in gaps and after the end."""
        lanes = self._lanes[value]
        height, width = value.size
        keep = torch.zeros(height + 16, lanes.pitch, self.batch, dtype=torch.int32)
        keep[:height, :width] = -1
        return self._constant(keep.reshape(-1)[: lanes.plane + 64].contiguous(), "keep", value.size, lanes.pitch)

    def _constant(self, tensor: Tensor, *key: object) -> int:
        """Returns the number of a constant in the program. Constants of the same `key` are stored once."""
        if key and key in self._shared:
            return self._shared[key]
        self.constants.append(tensor)
        if key:
            self._shared[key] = len(self.constants) - 1
        return len(self.constants) - 1

    def _links(self, steps: list[tuple[encoding.AnyStep, list[Value]]]) -> list[int]:
        """Returns, for each step, how many of the following steps are computed with it while a tile is in the cache.

        These are 1x1 convolutions: an output position depends only on the same position of the input.
        """
        links = [0] * len(steps)
        pointwise = {
            first: layer.spec.kernel == layer.spec.stride == (1, 1) and layer.spec.padding == (0, 0)
            for layer, (first, *_) in self.layer_steps.items()
        }
        begin = 0
        for i in range(1, len(steps)):
            (step, values), (before, _) = steps[i], steps[i - 1]
            joined = pointwise.get(i) and pointwise.get(i - 1)
            joined = joined and KINDS["vector"] not in (step.kind, before.kind) and step.tile == before.tile
            if joined and len({(v.images, self._lanes[v], v.size) for v in (*values, *steps[i - 1][1])}) == 1:
                links[begin] += 1
            else:
                begin = i
        return links

    def _allocate(
        self, steps: list[tuple[encoding.AnyStep, list[Value]]], links: list[int]
    ) -> tuple[dict[Value, int], int]:
        """Returns each value's offset in the arena, and the arena's size, both in floats.

        Memory of values that are no longer read is reused. A layer that adds a residual which no later step reads
        writes its output over the residual.
        """
        born: dict[Value, int] = {}
        last: dict[Value, int] = {}
        fed: set[tuple[int, Value]] = set()  # the values that convolutions read as their data, and when
        read: dict[Value, int] = {}  # the last step that reads a value (steps computed together count separately)
        inherits: dict[Value, tuple[Value, int]] = {}  # the residual that an output may overwrite, and the step
        now = end = 0
        for i, (step, values) in enumerate(steps):
            if i > end or i == 0:
                now, end = i, i + links[i]
            for value in values:
                born.setdefault(value, now)
                last[value] = now
                read[value] = i
            if isinstance(step, encoding.ConvStep):
                fed.add((now, values[1]))
                same = values[0].format.precision == values[-1].format.precision
                if len(values) > 2 and step.kind != KINDS["vector"] and same:
                    inherits[values[0]] = values[2], i
        offsets: dict[Value, int] = {}
        live: list[tuple[int, int, Value]] = []
        total = 0
        for value in sorted(born, key=born.get):
            residual, reader = inherits.get(value, (None, -1))
            if residual is not None and read[residual] == reader and (born[value], residual) not in fed:
                offsets[value] = offsets[residual]
                live = [(start, stop, value if v is residual else v) for start, stop, v in live]
                continue
            live = [entry for entry in live if last[entry[2]] >= born[value]]
            need = -(-value.images // self.batch) * value.planes * self._lanes[value].plane + 16 * LINE
            at = 0
            for start, stop, _ in sorted(live, key=lambda e: e[0]):
                if start - at >= need:
                    break
                at = max(at, stop)
            offsets[value] = at
            live.append((at, at + need, value))
            total = max(total, at + need)
        return offsets, total

    def lanes_of(self, layer: Convolution) -> Lanes:
        """Returns how the activations lie that a layer reads and writes."""
        return self._lanes[layer.out]

    @property
    def nbytes(self) -> int:
        """Returns the bytes that the packed weights and index structures take."""
        return sum(t.numel() * t.element_size() for t in self.constants)

    def arena(self) -> Tensor:
        """Returns new memory for the activations of one call, aligned to a cache line."""
        memory = torch.zeros(self.arena_floats + 2 * LINE, dtype=torch.float32, device="cpu")
        skip = -memory.data_ptr() % 64 // 4
        return memory[skip : skip + self.arena_floats + LINE]

    def run(self, inputs: list[Tensor], arena: Tensor, *, time: bool = False) -> list[Tensor]:
        """Returns the tensors of `segment.outputs`, in order, and with `time` also the nanoseconds of each step."""
        inputs = [t.contiguous() for t in inputs]
        results = torch.ops.granet.run(inputs, self.constants, arena, self.program, time)
        outputs = [t.view(v.shape) for t, v in zip(results, self.segment.outputs, strict=False)]
        return [*outputs, *results[len(outputs) :]]
