"""What a compiled model has to beat: the dense model in both memory formats, and at reduced precision in autocast."""

import pytest
import torch
from torch import nn

from granet.engine import inference
from granet.engine.baselines import dense_calls, faster_one
from granet.engine.timing import Spread


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 5)).eval()


LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("precision", "images", "names"),
    [
        ("float32", True, ["dense", "dense, channels_last"]),
        ("float32", False, ["dense"]),
        ("int8", True, ["dense", "dense, bfloat16 autocast", "dense, channels_last",
                        "dense, bfloat16 autocast, channels_last"]),
        ("bfloat16", False, ["dense", "dense, bfloat16 autocast"]),
    ],
)  # fmt: skip
def test_every_way_computes_the_same_and_leaves_the_model_alone(precision, images, names):
    model = convolutions() if images else nn.Sequential(nn.Linear(6, 7), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 9) if images else torch.randn(4, 6)
    with torch.no_grad():
        expected = model(x)
        before = {name: (t.stride(), t.clone()) for name, t in model.state_dict().items()}
        calls = dense_calls(model, (x,), {}, precision)
        assert list(calls) == names
        for name, call in calls.items():
            found = call()
            assert found.dtype == (torch.bfloat16 if "bfloat16" in name else torch.float32)
            torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
    for name, tensor in model.state_dict().items():
        assert tensor.stride() == before[name][0] and torch.equal(tensor, before[name][1])


def test_inputs_in_channels_last_are_also_tried_contiguous():
    x = torch.randn(2, 3, 9, 9).contiguous(**LAST)
    assert list(dense_calls(convolutions(), (x,), {}, "float32")) == ["dense", "dense, contiguous"]


def spread(ms):
    return Spread(ms, ms, ms, 3)


def test_the_compiled_model_has_to_beat_them_all():
    dense = {"dense": spread(10.0), "dense, bfloat16 autocast": spread(4.0), "dense, channels_last": spread(8.0)}
    assert faster_one(dense, spread(3.0)) is None
    assert faster_one(dense, spread(5.0)) == "dense, bfloat16 autocast"
    assert faster_one(dense, spread(20.0)) == "dense, bfloat16 autocast"


def test_the_report_names_them(always):
    model, x = convolutions(), torch.randn(2, 3, 9, 9)
    report = inference.compile(model, x, precision="bfloat16", tolerance=1.0).report()
    assert set(report.others) == {
        "dense, channels_last", "dense, bfloat16 autocast", "dense, bfloat16 autocast, channels_last",
    }  # fmt: skip
    assert all(ms > 0 for ms in report.others.values())
    assert all(f"{name} {ms:.2f} ms" in str(report) for name, ms in report.others.items())
