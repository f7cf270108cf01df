import copy
import logging
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from fuzz_models import check_every_choice, network
from torch import nn

from granet.engine import inference, ops
from granet.engine.capture import trace
from granet.engine.graph import tensors_of
from granet.engine.program import Program, kernel_choices
from granet.engine.runtime import build


@pytest.mark.parametrize(
    ("activation", "images", "size"), [(nn.ReLU(), 1, 37), (nn.ReLU6(), 3, 32), (nn.SiLU(), 17, 24)]
)
def test_every_kernel_and_layout_computes_the_model(activation, images, size):
    torch.manual_seed(0)
    check_every_choice(network(activation, 0.3), torch.randn(images, 3, size, size))


def test_any_number_of_threads_computes_the_same():
    torch.manual_seed(0)
    model, x, threads = network(nn.ReLU(), 0.3), torch.randn(2, 3, 64, 64), torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            check_every_choice(model, x)
    finally:
        torch.set_num_threads(threads)


class OneResidual(nn.Module):
    """Several 1x1 layers, each adding the same residual to what the one before gave."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(8, 32, 3, padding=1)
        self.layer = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        residual, y = self.first(x), self.second(x)
        for _ in range(3):
            y = torch.relu(self.layer(y) + residual)
        return (y,)


def test_a_residual_is_kept_until_the_last_layer_has_added_it():
    torch.manual_seed(0)
    model = OneResidual().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand_like(p) < 0.2 if p.ndim > 1 else 1.0)
    check_every_choice(model, torch.randn(3, 8, 16, 16))


def wide(density=0.02):
    """A model whose zeros pay on any machine."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(192, 192, 3, padding=1, bias=False), nn.BatchNorm2d(192), nn.ReLU()] * 2
    model = nn.Sequential(*(copy.deepcopy(layer) for layer in layers)).eval()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) < density)
    return model


def test_a_sparse_model_gets_faster_and_says_so():
    model, x = wide(), torch.randn(1, 192, 28, 28)
    fast = inference.compile(model, x)
    report = fast.report()
    assert report.chosen == "sparse"
    assert report.fast_ms < report.dense_ms
    assert [row.name for row in report.layers] == ["0", "3"]
    assert all(row.sparse_ms < row.dense_ms and 0.01 < row.density < 0.03 for row in report.layers)
    assert "runs sparse" in str(report)
    assert report.nbytes < 192 * 192 * 9 * 2 * 4  # less than the dense weights
    torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)


def test_other_shapes_are_compiled_when_they_come_up_to_a_number(caplog):
    model = wide()
    first, second, third = torch.randn(1, 192, 28, 28), torch.randn(2, 192, 20, 20), torch.randn(1, 192, 16, 16)
    fast = inference.compile(model, first, shapes=2)
    with pytest.raises(ValueError, match="not compiled for 2x192x20x20; it is for 1x192x28x28"):
        fast.report(second)
    for x in (second, first, second):
        torch.testing.assert_close(fast(x), model(x).detach(), atol=1e-4, rtol=1e-4)
    assert fast.report(second).chosen == "sparse"
    assert fast.report(second) is not fast.report()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for _ in range(2):
        assert torch.equal(fast(third), model(third).detach())
    assert caplog.text.count("such inputs run the dense model") == 1
    with pytest.raises(ValueError, match="shapes"):
        inference.compile(model, first, shapes=0)


def test_a_dense_model_stays_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    x = torch.randn(256, 512)
    fast = inference.compile(model, x)
    report = fast.report()
    assert report.fast_ms <= report.dense_ms
    torch.testing.assert_close(fast(x), model(x).detach(), atol=1e-4, rtol=1e-4)


class Attention(nn.Module):
    """A layer of a transformer: operators the kernels do not know between linears they do."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(nn.functional.relu(self.up(x)))


class TokenNorm(nn.Module):
    """Batch-norm over the tokens of as many tokens as features: not the axis that the linear layer's channels are."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)

    def forward(self, x):
        return self.norm(self.linear(x))


class Unusual(nn.Module):
    """Conv1d, a branch used twice, and a convolution the kernels do not support."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, padding=1)
        self.circular = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.three = nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2)

    def forward(self, x):
        y = torch.relu(self.one(x))
        z = self.circular(y) + y
        return {"a": self.three(z), "b": (y, z.sum())}


class Untraceable(nn.Module):
    """What no single graph can hold: a branch on the data. A weight is read from outside its layer, too."""

    def __init__(self):
        super().__init__()
        self.features, self.head, self.unused = wide(), nn.Linear(192, 10), nn.Linear(3, 3)

    def forward(self, x):
        y = self.features(x) if x.sum() > 0 else x
        return self.head(y.mean([2, 3])) * self.head.weight.abs().max()


def test_a_model_with_a_branch_on_its_data_is_captured_in_parts():
    torch.manual_seed(0)
    model, x = Untraceable().eval(), torch.rand(1, 192, 28, 28)
    fast = inference.compile(model, x)
    report = fast.report()
    assert report.chosen == "sparse"
    assert report.fast_ms < report.dense_ms
    assert "captured in" in report.why
    chosen = {row.name: row.chosen for row in report.layers}
    assert chosen["features.0"] == chosen["features.3"] == "sparse"
    for other in (x, -x, torch.rand(2, 192, 12, 12)):
        torch.testing.assert_close(fast(other), model(other).detach(), atol=1e-4, rtol=1e-4)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    torch.testing.assert_close(copied(x), model(x).detach(), atol=1e-4, rtol=1e-4)
    assert "forward" not in model.features[0].__dict__
    assert fast.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Attention(), torch.randn(2, 10, 64)),
        (Unusual(), torch.randn(3, 6, 21)),
        (TokenNorm(), torch.randn(3, 24, 24)),
    ],
    ids=["linear", "conv1d", "tokens"],
)
def test_models_with_unsupported_parts(model, x, monkeypatch):
    monkeypatch.setattr("granet.engine.timing.NOISE", -1e9)  # take the compiled model whether it wins or not
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fast = inference.compile(model, x)
    assert fast.report().chosen == "sparse"
    expected, found = tensors_of([model(x)]), tensors_of([fast(x)])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.Linear(4, 4).double(), torch.randn(2, 4).double(), "float64"),
        (nn.Linear(4, 4).half(), torch.randn(2, 4).half(), "float16"),
        (nn.Linear(4, 4, device="meta"), torch.randn(2, 4, device="meta"), "not on meta"),
    ],
)
def test_unsupported_models_run_dense_and_say_why(model, x, reason):
    fast = inference.compile(model.eval(), x)
    assert fast.report().chosen == "dense"
    assert reason in fast.report().why
    assert fast(x).shape == x.shape


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        inference.compile(nn.Linear(4, 4), torch.randn(2, 4))


def test_threads_share_a_compiled_model_and_copies_work():
    model = wide()
    inputs = [torch.randn(1, 192, 28, 28) for _ in range(3)]
    fast = inference.compile(model, inputs[0])
    expected = [model(x).detach() for x in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.allclose(fast(inputs[i]), expected[i], atol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    torch.testing.assert_close(copy.deepcopy(fast)(inputs[0]), expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(inputs[0]), expected[0], atol=1e-4, rtol=1e-4)


def test_without_a_compiler_everything_works_and_says_so_once(tmp_path):
    program = """
import logging, torch
from granet.engine import inference
logging.basicConfig()
model = torch.nn.Linear(4, 4).eval()
for _ in range(2):
    fast = inference.compile(model, torch.randn(2, 4))
    assert fast.report().chosen == "dense", fast.report()
    fast(torch.randn(2, 4))
"""
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "", "GRANET_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr.count("no C++ compiler found") == 1


@pytest.mark.parametrize("images", [1, 2, 16])
@pytest.mark.parametrize(
    ("kernel", "size", "padding", "stride"),
    [(3, 3, 0, 1), (5, 5, 0, 1), (2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 2), (1, 1, 0, 1), (1, 1, 1, 3), (1, 2, 0, 2)],
)
def test_an_output_of_one_position(kernel, size, padding, stride, images):
    """Every way to compute the last convolution of a LeNet, say, whatever lies around its only position."""
    model = nn.Sequential(nn.Conv2d(16, 32, kernel, stride, padding)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.2)
    x = torch.randn(images, 16, size, size)
    ((part, args),) = trace(model, x)
    stages, _ = part.stages(args)
    for batch in (1, ops.cpu()[0]):
        for pick in kernel_choices(stages.segments[0].layers[0], batch):
            programs = {s: Program(s, lambda layer, pick=pick: pick, batch) for s in stages.segments}
            with torch.no_grad():
                (found,) = build(stages, programs)(*args)
                torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-4)
