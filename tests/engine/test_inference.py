import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from small_models import wide
from torch import nn

from granet.engine import inference


def test_other_shapes_are_compiled_when_they_come_up_to_a_number(always, caplog):
    model = wide()
    first, second, third = torch.randn(1, 192, 28, 28), torch.randn(2, 192, 20, 20), torch.randn(1, 192, 16, 16)
    fast = inference.compile(model, first, shapes=2)
    with pytest.raises(ValueError, match="not compiled for 2x192x20x20, only for 1x192x28x28"):
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


class Untraceable(nn.Module):
    """What no single graph can hold: a branch on the data. A weight is read from outside its layer, too."""

    def __init__(self):
        super().__init__()
        self.features, self.head, self.unused = wide(), nn.Linear(192, 10), nn.Linear(3, 3)

    def forward(self, x):
        y = self.features(x) if x.sum() > 0 else x
        return self.head(y.mean([2, 3])) * self.head.weight.abs().max()


def test_a_model_with_a_branch_on_its_data_is_captured_in_parts(always):
    torch.manual_seed(0)
    model, x = Untraceable().eval(), torch.rand(1, 192, 28, 28)
    fast = inference.compile(model, x)
    report = fast.report()
    assert report.chosen == "sparse"
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
