"""Compiled models go through a file and compute the same, to the bit, without the model's code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_models import network
from fuzz_saved import archived, loaded
from small_models import mlp, sparse, wide
from torch import nn
from torch.utils._pytree import tree_leaves

import granet
from granet.engine.capture import trace
from granet.engine.saved.model import isa as isa_here
from granet.train import models


def shapes():
    """Strides, groups, dilation, one-dimensional kernels, pooling, and activations of every kind."""
    layers = [nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.SiLU(), nn.Conv2d(8, 12, 1, groups=4), nn.ReLU6()]
    layers += [nn.MaxPool2d(3, 2, 1), nn.Conv2d(12, 12, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2)]
    return sparse(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)))


class Words(nn.Module):
    """Layers that torch computes stand between those of the kernels; outputs and inputs are nested."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 32), nn.LayerNorm(32)
        self.inside, self.outside = nn.Linear(32, 96), nn.Linear(32, 32)
        self.transposed, self.statistics = nn.ConvTranspose1d(32, 16, 3), nn.BatchNorm1d(16)

    def forward(self, words, *, scale, causal):
        x = self.words(words["first"])
        q, k, v = self.inside(self.norm(x)).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(2, 9, 32)
        x = x + self.outside(y) * scale
        return {"x": x.softmax(-1), "rest": [self.statistics(self.transposed(x.transpose(1, 2))), words["first"], 3]}


PRECISIONS = ("float32", "bfloat16", "int8")
CASES = {
    "residual sums": (lambda: network(nn.ReLU6(), 0.3), (2, 3, 24, 24), {}),
    "resnet20": (lambda: sparse(models.build("resnet20", classes=10, in_channels=3), 0.1), (1, 3, 16, 16), {}),
    "images innermost": (shapes, (20, 8, 20, 20), {"batch": 16}),
    "linear layers": (mlp, (20, 16), {"batch": 16}),
    "one row": (mlp, (1, 16), {}),
    "shapes": (shapes, (3, 8, 20, 20), {"block": True}),
}


def compiled(model, inputs, precision="float32", **more):
    if precision == "int8":
        more["calibration"] = [inputs if isinstance(inputs, dict) else tuple(inputs)]
    return granet.compile(model, inputs, precision=precision, tolerance=0.5, **more)


def same(found, expected):
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    return all(
        torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c == "resnet20" else ()) for c in CASES])
def test_a_file_computes_the_same_to_the_bit(case):
    build, shape, choices = CASES[case]
    torch.manual_seed(0)
    x = torch.rand(shape)
    (traced,) = trace(build(), x)
    for precision in PRECISIONS:
        content, fast = archived(traced, x, precision, **choices)
        model = loaded(content)
        for other in (torch.rand(shape), torch.rand(shape).transpose(-1, -2).contiguous().transpose(-1, -2)):
            assert other.shape != shape or same(model(other), fast(other))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_compiled_models_are_saved_and_loaded(always, tmp_path, precision):
    model, x = mlp(), torch.rand(20, 16)
    fast = compiled(model, [x], precision)
    fast.save(tmp_path / "fast.granet")
    found = granet.load_compiled(tmp_path / "fast.granet")
    other = torch.rand_like(x)
    assert same(found(other), fast(other)) and 0 < (found(other) - model(other)).abs().max() < 0.1
    assert found.nbytes == fast.report().nbytes and fast.report().precision == precision
    assert f"{fast.report()}; measured on " in str(found.report())


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_torchs_own_layers_and_nested_arguments_are_saved(always, tmp_path, precision):
    torch.manual_seed(0)
    model = sparse(Words())
    given = {"words": {"first": torch.randint(0, 11, (2, 9))}, "scale": torch.tensor(2.0), "causal": True}
    fast = compiled(model, given, precision)
    fast.save(tmp_path / "fast.granet")
    loaded = granet.load_compiled(tmp_path / "fast.granet")
    found, expected = loaded(**given), fast(**given)
    assert same(found, expected) and list(found) == ["x", "rest"] and found["rest"][2] == 3
    assert found["rest"][1] is given["words"]["first"]
    with pytest.raises(ValueError, match="not for causal=False, scale=a number, first=2x9 of int64"):
        loaded(**{**given, "causal": False})


def test_every_shape_is_saved_and_others_are_refused(always, tmp_path):
    model, x = mlp(), torch.rand(2, 16)
    fast = granet.compile(model, x)
    wide_batch = torch.rand(33, 16)
    fast(wide_batch)
    fast.save(str(tmp_path / "fast.granet"))
    loaded = granet.load_compiled(str(tmp_path / "fast.granet"))
    assert torch.equal(loaded(x), fast(x)) and torch.equal(loaded(wide_batch), fast(wide_batch))
    assert str(fast.report(wide_batch)) in str(loaded.report(wide_batch))
    with pytest.raises(ValueError, match=r"was saved for inputs 2x16; 33x16, not for 3x16: call the compiled model"):
        loaded(torch.rand(3, 16))
    with pytest.raises(ValueError, match="not for 2x16 of float64"):
        loaded(x.double())
    with pytest.raises(ValueError, match="not for 2x16 on meta"):
        loaded.report(x.to("meta"))
    assert "inputs 2x16; 33x16" in repr(loaded)


def test_gradients_transforms_and_autocast(always, tmp_path):
    fast = granet.compile(mlp(), torch.rand(2, 16))
    fast.save(tmp_path / "fast.granet")
    loaded, x = granet.load_compiled(tmp_path / "fast.granet"), torch.rand(2, 16)
    expected = loaded(x)
    assert not expected.requires_grad
    with pytest.raises(ValueError, match=r"requires a gradient.*call it under torch.no_grad"):
        loaded(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(loaded(x.clone().requires_grad_()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded(x), expected)
    with pytest.raises(ValueError, match=r"cannot be called under torch.func"):
        torch.func.grad(lambda t: loaded(t).sum())(x)


def test_present_weights_are_saved(always, tmp_path):
    model, x = wide(0.1), torch.rand(2, 192, 12, 12)
    fast = granet.compile(model, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    fast.save(tmp_path / "fast.granet")
    torch.testing.assert_close(granet.load_compiled(tmp_path / "fast.granet")(x), model(x), rtol=1e-3, atol=1e-4)


FRESH = """
import sys, torch
torch.set_num_threads(2)
import granet
for name in ("float32", "bfloat16", "int8"):
    model = granet.load_compiled(f"{sys.argv[1]}/{name}")
    x, expected = torch.load(f"{sys.argv[1]}/{name}.pt")
    for found, wanted in zip(model(x), expected, strict=True):
        print(((found - wanted).square().sum() / wanted.square().sum()).sqrt().item())
print(*(name in sys.modules for name in ("torch._dynamo", "granet.engine.capture", "granet.train")))
"""


@pytest.mark.parametrize(
    ("isa", "flag"),
    [(None, ""), ("generic", ""), ("avx2", " fma "), ("avx512", " avx512bw "), ("avxvnni", " avx_vnni ")],
)
def test_fresh_processes_with_and_without_the_instructions(tmp_path, isa, flag):
    """Nothing is captured or compiled there, and every instruction set runs what any of them packed."""
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {isa}")
    torch.manual_seed(0)
    x = torch.rand(20, 8, 20, 20)
    (traced,) = trace(shapes(), x)
    for precision in PRECISIONS:
        content, fast = archived(traced, x, precision, batch=16)
        (tmp_path / precision).write_bytes(content)
        torch.save((x, fast(x)), tmp_path / f"{precision}.pt")
    environment = {**os.environ, "GRANET_ISA": isa} if isa else dict(os.environ)
    command = [sys.executable, "-W", "error", "-c", FRESH, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *apart, imported = done.stdout.splitlines()
    bounds = (1e-6, 1e-2, 1e-2) if isa else (0, 0, 0)  # bytes are equal, and sums of real numbers follow them
    assert imported == "False False False" and all(map(float.__le__, map(float, apart), map(float, bounds))), apart
    slower = isa not in (None, isa_here())  # than with the instructions of this process
    assert ("results are right, but slower" in done.stderr) == slower
