"""Kernels, programs and compiled models at reduced precision."""

import copy
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_reduced import check_bytes, check_network, check_sums
from small_models import wide
from torch import nn

import granet
from granet.engine.precision import FLOAT32, Format, int8_format, quantised_weight
from granet.engine.quantise import relative_error

HERE = Path(__file__).parent


@pytest.mark.parametrize("seed", range(12))
def test_sums_of_bytes_are_those_of_integers_to_the_bit(seed):
    check_sums(seed)


@pytest.mark.parametrize("seed", range(8))
def test_bytes_are_those_of_the_formula(seed):
    check_bytes(seed)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_networks_are_close_and_the_same_under_every_choice(seed):
    check_network(seed)


@pytest.mark.parametrize(
    ("isa", "flag"),
    [
        ("generic", ""),
        pytest.param("avx2", " fma ", marks=pytest.mark.slow),
        pytest.param("avxvnni", " avx_vnni ", marks=pytest.mark.slow),
        pytest.param("avx512", " avx512bw ", marks=pytest.mark.slow),
        pytest.param("avx512vnni", " avx512_vnni ", marks=pytest.mark.slow),
        pytest.param("avx512bf16", " avx512_bf16 ", marks=pytest.mark.slow),
    ],
)
def test_every_instruction_set_of_this_machine(isa, flag):
    """The best one is that of the other tests."""
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {isa}")
    command = [sys.executable, str(HERE / "fuzz_reduced.py"), "1"]
    environment = {**os.environ, "GRANET_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_formats_hold_zero_exactly():
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        form = int8_format(low, high)
        assert form.channels == 4 and 0 <= form.zero <= 255 and form.scale > 0
        assert (0 - form.zero) * form.scale <= low + form.scale and (255 - form.zero) * form.scale >= high - form.scale
    assert Format("bfloat16").channels == 2 and FLOAT32.channels == 1
    weight = torch.tensor([[0.0, 0.0], [-2.0, 1.0]])
    quantised, scale = quantised_weight(weight)
    assert quantised.tolist() == [[0, 0], [-127, 64]] and scale[1] == 2 / 127


def calibration():
    torch.manual_seed(1)
    return [torch.rand(5, 192, 12, 12) for _ in range(2)]


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_a_compiled_model_is_close_and_says_its_precision(always, precision, bound):
    model, x = wide(0.1), torch.rand(2, 192, 12, 12)
    given = {"calibration": calibration()} if precision == "int8" else {}
    fast = granet.compile(model, x, precision=precision, **given)
    report = fast.report()
    assert report.chosen == "sparse" and report.precision == precision and 0 < report.error < bound
    assert [row.chosen for row in report.layers] == [precision] * 2 and f"compiled to {precision}" in str(report)
    for images in (torch.rand(2, 192, 12, 12), x):
        found = fast(images)
        assert found.dtype == torch.float32 and 0 < relative_error(model(images), found) < bound
    other = torch.rand(1, 192, 12, 12)
    assert 0 < relative_error(model(other), fast(other)) < bound  # another shape is calibrated when it comes
    assert fast.report(other).chosen == "sparse"
    twin = pickle.loads(pickle.dumps(fast))
    assert torch.equal(twin(x), fast(x))


def test_new_weights_are_packed_at_the_same_precision(always, caplog):
    model, x = wide(0.1), torch.rand(2, 192, 12, 12)
    fast = granet.compile(model, x, precision="int8", calibration=calibration())
    with torch.no_grad():
        model[0].weight.mul_(0.95)
    expected = model(x)
    for _ in range(2):  # the second call with new weights packs them
        assert torch.equal(fast(x), expected)
    assert 0 < relative_error(expected, fast(x)) < 0.1
    with torch.no_grad():
        model[0].weight.mul_(30)  # outside of the ranges that were calibrated
    for _ in range(3):
        assert torch.equal(fast(x), model(x))
    assert caplog.text.count("weights that have changed were not packed") == 1


def test_layers_that_lose_too_much_stay_in_float32(always):
    model, x = wide(0.1), torch.rand(2, 192, 12, 12)
    loose = granet.compile(model, x, precision="int8", calibration=calibration()).report().error
    fast = granet.compile(model, x, precision="int8", calibration=calibration(), tolerance=0.9 * loose)
    report = fast.report()
    kept = [row for row in report.layers if row.chosen != "int8"]
    assert len(kept) == 1 and "kept in float32" in kept[0].why and report.error <= 0.9 * loose
    assert 0 < relative_error(model(x), fast(x)) < loose
    tight = granet.compile(model, x, precision="bfloat16", tolerance=1e-6)
    assert tight.report().chosen == "dense" and "in bfloat16 the outputs differ by" in tight.report().why
    assert torch.equal(tight(x), model(x))


def test_what_bytes_cannot_hold_is_an_error(always):
    model, x = wide(0.1), torch.rand(2, 192, 12, 12)
    fast = granet.compile(model, x, precision="int8", calibration=calibration())
    fast(x)
    for bad in (float("nan"), float("inf")):
        wrong = x.clone()
        wrong[1, 3, 4, 5] = bad
        with pytest.raises(RuntimeError, match="NaN or infinite values, which int8 cannot represent"):
            fast(wrong)
    assert torch.equal(fast(x), fast(x))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, "unknown precision 'int4': choose from float32, bfloat16, int8"),
        ({"precision": "int8"}, ValueError, "needs calibration data"),
        ({"precision": "bfloat16", "calibration": [torch.rand(2, 192, 12, 12)]}, ValueError, "would have no effect"),
        ({"precision": "int8", "calibration": []}, ValueError, "there is no calibration data"),
        ({"precision": "int8", "calibration": 3}, TypeError, "an iterable of batches is needed"),
        ({"precision": "int8", "calibration": [torch.rand(1, 192, 12, 12)]}, ValueError, "as large as the example"),
        ({"precision": "int8", "calibration": [torch.rand(2, 192, 8, 8)]}, ValueError, "2x192x8x8 of torch.float32"),
        ({"precision": "int8", "calibration": ["text"]}, ValueError, "a calibration batch is the text 'text'"),
        ({"precision": "int8", "calibration": [torch.full((2, 192, 12, 12), torch.nan)]}, ValueError, "holds NaN"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        granet.compile(wide(0.1), torch.rand(2, 192, 12, 12), **settings)


class TwoInputs(nn.Module):
    """A model whose second input is given by name."""

    def __init__(self):
        super().__init__()
        self.body = copy.deepcopy(wide(0.1))

    def forward(self, x, *, scale):
        return self.body(x) * scale


def test_batches_of_a_data_loader_and_of_names_calibrate(always, caplog):
    model, x = TwoInputs().eval(), torch.rand(2, 192, 12, 12)
    for batch in ({"x": torch.rand(4, 192, 12, 12), "scale": torch.tensor(2.0)},):
        fast = granet.compile(model, {"x": x, "scale": torch.tensor(2.0)}, precision="int8", calibration=[batch])
        assert fast.report().chosen == "sparse"
        expected = model(x, scale=torch.tensor(2.0))
        assert 0 < relative_error(expected, fast(x=x, scale=torch.tensor(2.0))) < 0.05
    pairs = [(torch.rand(4, 192, 12, 12), torch.zeros(4, dtype=torch.long))]
    assert granet.compile(wide(0.1), x, precision="int8", calibration=pairs).report().chosen == "sparse"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
