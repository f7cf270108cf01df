import pytest
import torch

from granet.lab import speed
from granet.train.recipe import validate
from granet.train.run import Run, execute


def test_inference_of_a_named_model():
    report = speed.main("resnet20", sparsity=0.95, batch=1).report
    assert report.dense_ms > 0
    assert report.fast_ms <= report.dense_ms
    assert {row.name for row in report.layers} > {"stem.0", "head"}
    total = sum(row.density * torch.Size(row.shape).numel() for row in report.layers)
    # batch-norm scales are folded in, zeros stay zeros
    assert total / sum(torch.Size(row.shape).numel() for row in report.layers) == pytest.approx(0.05, abs=0.002)


def test_a_run_is_calibrated_on_its_images_and_tested(tmp_path):
    method = {"name": "static", "sparsity": 0.9, "distribution": "uniform"}
    train = {"epochs": 4, "batch_size": 32, "lr": 0.1, "threads": 2, "device": "cpu"}
    model = {"name": "mlp", "pattern": "1x4"}
    values = {"name": "x", "data": {"name": "digits"}, "model": model, "method": method, "train": train}
    recipe = validate(values, source="test")
    run = Run.for_recipe(recipe, tmp_path)
    execute(run)
    for precision in ("int8", "bfloat16"):
        found = speed.main(str(run.path), precision=precision, batch=4)
        assert found.report.precision == precision or found.report.chosen == "dense"
        assert found.images > 300 and found.images % 4 == 0
        assert found.dense_accuracy > 0.3 and abs(found.fast_accuracy - found.dense_accuracy) < 0.03
        assert "test images: dense float32" in str(found)
    with pytest.raises(ValueError, match="precision is for inference"):
        speed.main(str(run.path), precision="int8", training=True)


def test_training_of_a_named_model():
    report = speed.main("resnet20", sparsity=0.95, batch=8, size=8, training=True)
    assert report.dense_ms > 0
    assert report.fast_ms > 0
    assert "training step" in str(report)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="resnet20"):
        speed.main("resnet21")
