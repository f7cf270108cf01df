"""Programs at reduced precision against plain references; run as a program under each instruction set.

`python tests/engine/fuzz_reduced.py SEEDS`
"""

import sys
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from fuzz_models import network
from torch import Tensor, nn

from granet.engine import ops
from granet.engine.capture import trace
from granet.engine.precision import FLOAT32, Format, quantised_weight
from granet.engine.program import WORD_TILES, KernelChoice, Program
from granet.engine.quantise import Ranges, formats_of, reduced, relative_error
from granet.engine.runtime import build
from granet.engine.spec import Spec
from granet.engine.steps import Convert, Convolution, Input, Segment, Value


def every_choice(segment: Segment) -> Iterator[Program]:
    """The programs of a segment under every layout and tile."""
    for batch, vectors, chain in product((1, ops.cpu()[0]), (1, 3, *WORD_TILES), (False, True)):
        longest = ops.reduced_cpu()[1]
        choice = KernelChoice("words", min(vectors, longest))
        yield Program(segment, lambda layer, choice=choice: choice, batch, chain=chain)


def random_layer(generator: torch.Generator) -> tuple[Spec, tuple[int, int], int]:
    """A layer, the size of its input, and the number of images."""

    def pick(*choices):
        return choices[torch.randint(len(choices), (1,), generator=generator).item()]

    groups = pick(1, 1, 1, 2, 3, 6)
    inputs, outputs = (6, 6) if groups == 6 else (groups * pick(1, 3, 4, 5, 9), groups * pick(1, 2, 4, 7, 16))
    kernel = pick((1, 1), (3, 3), (1, 3), (5, 2))
    spec = Spec(
        in_channels=inputs,
        out_channels=outputs,
        kernel=kernel,
        stride=pick((1, 1), (1, 1), (2, 2), (1, 2), (3, 3)),
        padding=(pick(0, kernel[0] // 2), pick(0, kernel[1] // 2)),
        dilation=pick((1, 1), (1, 1), (2, 1)),
        groups=groups,
    )
    return spec, pick((9, 9), (10, 13), (17, 5)), pick(1, 2, 5, 17)


def check_sums(seed: int) -> None:
    """Sums of products of bytes are those of integers, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    spec, size, images = random_layer(generator)
    x = torch.randint(0, 256, (images, spec.in_channels, *size), generator=generator).float()
    form = Format("int8", 1.0, int(torch.randint(0, 256, (1,), generator=generator)))
    weight = torch.randint(-127, 128, spec.weight_shape, generator=generator).float()
    weight *= torch.rand(weight.shape, generator=generator) < 0.4
    weight.view(spec.out_channels, -1)[:, 0] = 127  # the scale of every row is 1
    convolve = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation, "groups": spec.groups}
    expected = F.conv2d((x - form.zero).double(), weight.double(), **convolve).float()

    shape, out = tuple(x.shape), tuple(expected.shape)
    wide = Value(images, spec.in_channels, size, shape)
    narrow = Value(images, spec.in_channels, size, shape, form)
    result = Value(images, spec.out_channels, out[2:], out)
    layer = Convolution(result, [narrow], name="layer", spec=spec, weight=weight)
    segment = Segment(images, [Input(wide, []), Convert(narrow, [wide]), layer], [result])
    for program in every_choice(segment):
        arena = program.arena()
        for _ in range(2):
            (found,) = program.run([x - form.zero], arena)
            assert torch.equal(found.view(out), expected), (seed, spec)
            arena.fill_(float("nan"))


def check_bytes(seed: int) -> None:
    """Bytes of a layer with bias, residual and activation are those of the formula, up to ties of rounding."""
    generator = torch.Generator().manual_seed(seed)
    spec, size, images = random_layer(generator)
    if spec.stride != (1, 1):
        spec = Spec(in_channels=spec.in_channels, out_channels=spec.out_channels, groups=spec.groups)
    x = torch.randn(images, spec.in_channels, *size, generator=generator)
    weight = torch.randn(spec.weight_shape, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < 0.4
    bias = torch.randn(spec.out_channels, generator=generator)
    activation, act = [("", nn.Identity()), ("relu", nn.ReLU()), ("relu6", nn.ReLU6()), ("silu", nn.SiLU())][seed % 4]
    zero = 0 if activation.startswith("relu") else 90
    source, shortcut = Format("int8", 0.03, 120), Format("int8", 0.02, 100)
    target = Format("int8", 6 / 255 if activation == "relu6" else 0.05, zero)
    out_size = spec.output_size(size)
    y = torch.randn(images, spec.out_channels, *out_size, generator=generator)

    def stored(tensor: Tensor, form: Format) -> Tensor:
        return ((tensor / form.scale).round() + form.zero).clamp(0, 255)

    whole, scale = quantised_weight(weight)
    convolve = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation, "groups": spec.groups}
    real = F.conv2d((stored(x, source) - source.zero).double(), whole.double(), **convolve)
    real = real * (scale * source.scale).double()[:, None, None] + bias[:, None, None]
    real = act((real + (stored(y, shortcut) - shortcut.zero) * shortcut.scale).float())
    expected = (stored(real, target) - target.zero) * target.scale

    shapes = tuple(x.shape), tuple(y.shape)
    values = [Value(images, spec.in_channels, size, shapes[0]), Value(images, spec.out_channels, out_size, shapes[1])]
    low = [
        Value(v.images, v.channels, v.size, v.shape, form) for v, form in zip(values, (source, shortcut), strict=True)
    ]
    made, last = (Value(images, spec.out_channels, out_size, shapes[1], form) for form in (target, FLOAT32))
    layer = Convolution(made, low, name="layer", spec=spec, weight=weight, bias=bias, activation=activation)
    steps = [*(Input(v, [], key=v) for v in values), *(Convert(n, [v]) for n, v in zip(low, values, strict=True))]
    segment = Segment(images, [*steps, layer, Convert(last, [made])], [last])
    for program in every_choice(segment):
        arena = program.arena().fill_(float("nan"))
        (found,) = program.run([x, y], arena)
        apart = (found.view(shapes[1]) - expected).abs() / target.scale
        assert apart.max() < 1.01 and (apart > 0.5).float().mean() < 0.01, (seed, spec, apart.max())


def check_network(seed: int) -> None:
    """A network at both precisions is close to the one in float32, and int8 is the same under every choice."""
    torch.manual_seed(seed)
    activation = [nn.ReLU(), nn.ReLU6(), nn.SiLU()][seed % 3]
    images, size = [(1, 37), (3, 32), (17, 24)][seed % 3]
    x = torch.randn(images, 3, size, size)
    ((part, args),) = trace(network(activation, 0.3), x)
    with torch.no_grad():
        expected = part.module(*args)
        stages, _ = part.stages(args)
        ranges = Ranges(part.module, list(part.module.graph.nodes))
        ranges.see(args)
        formats = formats_of(stages, ranges)
        kept = [layer.name for s in stages.segments for layer in s.layers][1::3]
        for precision, names, bound in (("bfloat16", (), 0.02), ("int8", (), 0.1), ("int8", kept, 0.1)):
            low = reduced(stages, precision, formats, names)
            first = None
            (segment,) = low.segments
            for program in every_choice_with_floats(segment):
                run = build(low, {segment: program})
                found = run(*args)
                assert relative_error(expected, found) < bound, (seed, precision, relative_error(expected, found))
                first = first or found
                if precision == "int8" and not names:
                    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), seed


def every_choice_with_floats(segment: Segment) -> Iterator[Program]:
    """The programs of a segment of which some layers are in float32."""
    for batch, vectors, chain in product((1, ops.cpu()[0]), WORD_TILES, (False, True)):

        def choose(layer: Convolution, vectors: int = vectors) -> KernelChoice:
            if layer.inputs[0].format == FLOAT32:
                return KernelChoice("sparse", 8)
            return KernelChoice("words", min(vectors, ops.reduced_cpu()[1]))

        yield Program(segment, choose, batch, chain=chain)


if __name__ == "__main__":
    torch.set_num_threads(2)
    ops.prepare()
    for number in range(int(sys.argv[1])):
        check_sums(number)
        check_bytes(number)
        check_network(number)
