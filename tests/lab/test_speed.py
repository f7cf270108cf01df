import pytest
import torch

from granet.lab import speed


def test_inference_of_a_named_model():
    report = speed.main("resnet20", sparsity=0.95, batch=1)
    assert report.dense_ms > 0
    assert report.fast_ms <= report.dense_ms
    assert {row.name for row in report.layers} > {"stem.0", "head"}
    total = sum(row.density * torch.Size(row.shape).numel() for row in report.layers)
    # batch-norm scales are folded in, zeros stay zeros
    assert total / sum(torch.Size(row.shape).numel() for row in report.layers) == pytest.approx(0.05, abs=0.002)


def test_training_of_a_named_model():
    report = speed.main("resnet20", sparsity=0.95, batch=8, size=8, training=True)
    assert report.dense_ms > 0
    assert report.fast_ms > 0
    assert "training step" in str(report)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="resnet20"):
        speed.main("resnet21")
