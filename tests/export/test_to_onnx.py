import copy
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

import granet
from granet.export import FORMATS, ExportError

for package in FORMATS["onnx"].packages:
    pytest.importorskip(package, reason="needs the extra granet[export]")
onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")


def outputs(path, *arguments):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: one.numpy() for name, one in zip(names, arguments, strict=True)})


def test_a_file_computes_what_the_model_computes_for_any_batch(model, x, tmp_path):
    before = copy.deepcopy(model.state_dict())
    found = granet.export.onnx(model, x[:1], tmp_path / "model.onnx", inputs=[x, x[:3]])
    assert found.deviation < 1e-5 and found.comparison.examples == 7 and found.precision == "float32"
    assert found.nbytes == (tmp_path / "model.onnx").stat().st_size
    with torch.no_grad():
        for batch in (1, 4):
            expected = copy.deepcopy(model).eval()(x[:batch])
            np.testing.assert_allclose(outputs(found.path, x[:batch])[0], expected, atol=1e-5)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    proto = onnx.load(found.path)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b"site-packages" not in found.path.read_bytes()  # no paths of this machine
    assert "largest deviation from the model on 7 inputs" in str(found)


def test_int8_keeps_zeros_and_stays_close(model, x, tmp_path):
    calibration = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    found = granet.export.onnx(model, x, tmp_path / "model.onnx", precision="int8", calibration=calibration)
    proto = onnx.load(found.path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    arrays = [onnx.numpy_helper.to_array(one) for one in proto.graph.initializer]
    weights = [one for one in arrays if one.dtype == np.int8 and one.ndim == 4]
    assert sorted(one.shape for one in weights) == [(16, 3, 3, 3), (16, 16, 3, 3)]
    assert all((one == 0).mean() > 0.85 for one in weights)
    expected = copy.deepcopy(model).eval()(x)
    gap = np.abs(outputs(found.path, x)[0] - expected.detach().numpy()).max() / expected.abs().max().item()
    assert 1e-4 < gap == pytest.approx(found.deviation, rel=1e-3) and gap < 0.1


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens, y):
            return {"sum": self.linear(self.embedding(tokens)) + y, "y": y * 2}

    example = torch.arange(6).reshape(2, 3), torch.randn(2, 3, 3)
    found = granet.export.onnx(Two(), example, tmp_path / "two.onnx")
    assert found.deviation < 1e-5 and len(outputs(found.path, *example)) == 2


def test_adaptive_max_pooling_with_equal_windows(tmp_path):
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    found = granet.export.onnx(nn.AdaptiveMaxPool2d((3, 4)), x, tmp_path / "pool.onnx")
    assert found.deviation == 0
    with pytest.raises(
        ExportError, match=r"torch\.onnx cannot convert the model: .*from 7 to 5 has windows of several"
    ):
        granet.export.onnx(nn.AdaptiveMaxPool2d((5, 4)), x, tmp_path / "other.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["pool.onnx"]


def test_a_deviation_above_the_tolerance_leaves_no_file(model, x, tmp_path):
    with pytest.raises(ExportError, match="1e-12 is allowed: no file is left"):
        granet.export.onnx(model, x, tmp_path / "model.onnx", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []
