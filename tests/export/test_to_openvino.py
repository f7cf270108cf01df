import copy
from importlib import import_module

import numpy as np
import pytest
import torch

import granet
from granet.export import FORMATS, ExportError

for package in FORMATS["openvino"].packages:
    pytest.importorskip(package, reason="needs the extra granet[export]")
ov = import_module("openvino")


def test_a_file_computes_what_the_model_computes_for_any_batch(model, x, tmp_path):
    found = granet.export.openvino(model, x[:1], tmp_path / "model.xml", inputs=[x, x[:3]])
    assert found.deviation < 1e-5 and found.comparison.examples == 7
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert made.keys() == {"model.xml", "model.bin"} and found.nbytes == sum(made.values())
    compiled = ov.Core().compile_model(found.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = copy.deepcopy(model).eval()(x).detach()
    for batch in (1, 4):
        np.testing.assert_allclose(compiled(x[:batch].numpy())[0], expected[:batch], atol=1e-5)
    assert [dim.is_dynamic for dim in compiled.inputs[0].partial_shape] == [True, False, False, False]


def test_int8_keeps_zeros_and_stays_close(model, x, tmp_path):
    calibration = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    found = granet.export.openvino(model, x, tmp_path / "model.xml", precision="int8", calibration=calibration)
    constants = [op for op in ov.Core().read_model(found.path).get_ops() if op.get_type_name() == "Constant"]
    weights = [op.data for op in constants if op.data.dtype == np.int8 and op.data.ndim == 4]
    assert sorted(one.shape for one in weights) == [(16, 3, 3, 3), (16, 16, 3, 3)]
    assert all((one == 0).mean() > 0.85 for one in weights)
    assert 1e-4 < found.deviation < 0.1


def test_a_deviation_above_the_tolerance_leaves_no_file(model, x, tmp_path):
    with pytest.raises(ExportError, match="1e-12 is allowed"):
        granet.export.openvino(model, x, tmp_path / "model.xml", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []
