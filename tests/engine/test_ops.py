import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_layers import check_layer, check_panels, check_random_layers
from small_models import in_threads

from granet.engine import ops, reference
from granet.engine.spec import Spec

HERE = Path(__file__).parent


@pytest.mark.parametrize("seed", range(4))
def test_random_layers_equal_the_reference(seed):
    check_random_layers(20, seed)


def test_pointwise_layers_are_the_same_panel_by_panel():
    check_panels()


@pytest.mark.parametrize(("isa", "width"), [("generic", 4), ("avx2", 8), ("avx512", 16), ("avx512bf16", 16)])
def test_every_instruction_set_of_this_machine(isa, width):
    flags = Path("/proc/cpuinfo").read_text()
    needed = {"generic": "", "avx2": " fma ", "avx512": " avx512bw ", "avx512bf16": " avx512_bf16 "}[isa]
    if needed not in flags:
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, "GRANET_ISA": isa}
    command = [sys.executable, str(HERE / "fuzz_layers.py"), "12", "11"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == str(width)


def test_empty_rows_and_an_empty_layer():
    spec = Spec(in_channels=8, out_channels=6, kernel=(3, 3), padding=(1, 1))
    mask = torch.zeros(spec.weight_shape, dtype=torch.bool)
    x, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(spec.weight_shape), torch.randn(6)
    y = ops.conv(x, weight, bias, ops.layout(mask, spec, x.shape))
    assert torch.equal(y, bias.view(1, 6, 1, 1).expand(2, 6, 9, 9))
    mask[4, 3, 1, 1] = True
    y = ops.conv(x, weight, None, ops.layout(mask, spec, x.shape))
    assert torch.equal(y[:, [0, 1, 2, 3, 5]], torch.zeros(2, 5, 9, 9))
    torch.testing.assert_close(y[:, 4], x[:, 3] * weight[4, 3, 1, 1])


def test_a_nan_in_the_input_reaches_the_output():
    spec = Spec(in_channels=4, out_channels=4)
    x = torch.randn(1, 4, 5, 5)
    x[0, 2, 3, 3] = float("nan")
    mask = torch.ones(spec.weight_shape, dtype=torch.bool)
    y = ops.conv(x, torch.randn(spec.weight_shape), None, ops.layout(mask, spec, x.shape))
    assert y.isnan().nonzero()[:, 2:].unique(dim=0).tolist() == [[3, 3]]


@pytest.mark.parametrize("shape", [(3, 6, 9, 9), (20, 6)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_opcheck(shape, kind):
    kernel = (3, 3) if len(shape) == 4 else (1, 1)
    spec = Spec(in_channels=6, out_channels=4, kernel=kernel, padding=tuple(k // 2 for k in kernel))
    mask = torch.rand(spec.weight_shape) < 0.3
    half = kind is torch.bfloat16
    place = ops.layout(mask, spec, shape, bfloat16=half)
    f, b = place.forward, place.backward
    structure = (f.ptr, f.id, f.offset, f.index, b.ptr, b.id, b.offset, b.index, place.numbers)
    x = torch.randn(shape, requires_grad=True, dtype=kind)
    weight = torch.randn(spec.weight_shape, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    torch.library.opcheck(torch.ops.granet.conv, (x, weight, bias, *structure, spec.numbers, half, False, False))
    forward, backward = torch.ops.granet.conv_forward, torch.ops.granet.conv_backward
    if half:
        forward, backward = torch.ops.granet.conv_forward_bfloat16, torch.ops.granet.conv_backward_bfloat16
    inner = x.detach().movedim(1, -1).contiguous() if half else x.detach()
    arguments = (inner, weight.detach(), None, *structure[:4], place.numbers)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, (forward(*arguments), inner, weight.detach(), *structure, True, True))


def test_gradients_are_those_of_finite_differences():
    # The layer is linear in each argument, so a central difference is exact but for float32's rounding.
    spec = Spec(in_channels=3, out_channels=4, kernel=(3, 3), stride=(2, 1), padding=(1, 1))
    mask = torch.rand(spec.weight_shape) < 0.5
    x, weight, bias = torch.randn(2, 3, 6, 5), torch.randn(spec.weight_shape), torch.randn(4)
    place = ops.layout(mask, spec, x.shape)

    def f(x, weight, bias):
        return ops.conv(x, weight, bias, place).double().mul(direction).sum()

    direction = torch.randn_like(ops.conv(x, weight, bias, place), dtype=torch.float64)
    arguments = [t.clone().requires_grad_() for t in (x, weight, bias)]
    f(*arguments).backward()
    for i, argument in enumerate(arguments):
        step = torch.randn_like(argument)
        ahead, behind = ([t.detach() for t in arguments] for _ in range(2))
        ahead[i], behind[i] = ahead[i] + step, behind[i] - step
        expected = (f(*ahead) - f(*behind)).item() / 2
        assert (argument.grad * step).sum().item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_torch_compile_and_inference_mode():
    spec = Spec(in_channels=6, out_channels=4, kernel=(3, 3), padding=(1, 1))
    mask = torch.rand(spec.weight_shape) < 0.3
    x, weight = torch.randn(2, 6, 8, 8), torch.randn(spec.weight_shape, requires_grad=True)
    place = ops.layout(mask, spec, x.shape)

    def f(x, weight):
        return ops.conv(x * 2, weight, None, place).relu()

    expected = f(x, weight)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), expected)
    (gradient,) = torch.autograd.grad(expected.sum(), weight)
    (found,) = torch.autograd.grad(compiled(x, weight).sum(), weight)
    torch.testing.assert_close(found, gradient)
    with torch.inference_mode():
        torch.testing.assert_close(f(x, weight), expected.detach())


def test_several_python_threads():
    spec = Spec(in_channels=16, out_channels=16, kernel=(3, 3), padding=(1, 1))
    mask = torch.rand(spec.weight_shape) < 0.2
    weight = torch.randn(spec.weight_shape)
    inputs = [torch.randn(4, 16, 12, 12) for _ in range(4)]
    place = ops.layout(mask, spec, inputs[0].shape)
    expected = [reference.conv(x, weight, None, mask, spec) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.allclose(ops.conv(inputs[i], weight, None, place), expected[i], atol=1e-4):
                wrong.append(i)

    in_threads(work, 4)
    assert not wrong


def test_after_a_fork():
    # The parent must not have used torch's threads before: OpenMP does not survive a fork. A fresh process it is.
    program = """
import os, torch
from granet.engine import ops
from granet.engine.spec import Spec
torch.set_num_threads(1)
spec = Spec(in_channels=8, out_channels=8, kernel=(3, 3), padding=(1, 1))
mask = torch.rand(spec.weight_shape) < 0.2
x, weight = torch.randn(2, 8, 7, 7), torch.randn(spec.weight_shape)
place = ops.layout(mask, spec, x.shape)
expected = ops.conv(x, weight, None, place)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.conv(x, weight, None, place), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_wrong_arguments_are_errors_not_crashes():
    spec = Spec(in_channels=4, out_channels=4)
    mask = torch.ones(spec.weight_shape, dtype=torch.bool)
    place = ops.layout(mask, spec, (2, 4, 8, 8))
    weight = torch.randn(spec.weight_shape)
    for x in (torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).half(), torch.randn(2, 5, 8, 8)):
        with pytest.raises(RuntimeError, match="granet"):
            ops.conv(x, weight, None, place)


def test_any_number_of_images_with_one_structure():
    spec = Spec(in_channels=4, out_channels=8, kernel=(3, 3), padding=(1, 1))
    mask = torch.rand(spec.weight_shape) < 0.3
    weight = torch.randn(spec.weight_shape)
    place = ops.layout(mask, spec, (32, 4, 4, 4))
    for images in (1, 7, 40):
        x = torch.randn(images, 4, 4, 4)
        found = ops.conv(x, weight, None, place.with_images(images))
        torch.testing.assert_close(found, reference.conv(x, weight, None, mask, spec), atol=1e-4, rtol=1e-4)


def test_a_large_layer():
    spec = Spec(in_channels=128, out_channels=96, kernel=(3, 3), padding=(1, 1))
    check_layer(spec, (5, 128, 14, 14), 0.1, None, bias=True, last=True)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (Spec(in_channels=6, out_channels=8, kernel=(3, 3), stride=(2, 1), padding=(1, 1)), (3, 6, 9, 9)),
        (Spec(in_channels=8, out_channels=8, kernel=(3, 3), groups=2), (3, 8, 7, 7)),
        (Spec(in_channels=12, out_channels=5), (20, 12)),
    ],
)
def test_the_dense_gradient_is_that_of_every_weight(spec, shape):
    mask = torch.rand(spec.weight_shape) < 0.3
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(spec.weight_shape) * mask).requires_grad_(), torch.randn(spec.out_channels)
    bias.requires_grad_()
    y = ops.conv(x, weight, bias, ops.layout(mask, spec, shape), whole=True)
    everywhere = reference.conv(x, weight, bias, torch.ones_like(mask), spec)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, weight, bias], dy)
    for a, b in zip(found, torch.autograd.grad(everywhere, [x, weight, bias], dy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert found[1][~mask].any()
