import pytest

from granet.export import FORMATS
from granet.lab import exports
from granet.train.recipe import validate
from granet.train.run import Run, execute


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    method = {"name": "static", "sparsity": 0.9}
    train = {"epochs": 2, "batch_size": 32, "lr": 0.1, "threads": 2, "device": "cpu"}
    values = {"name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "method": method, "train": train}
    run = Run.for_recipe(validate(values, source="test"), tmp_path_factory.mktemp("runs"))
    execute(run)
    return run.path


def test_a_run_is_compared_on_its_test_images(run):
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package, reason="needs the extra granet[export]")
    found = exports.main(str(run), "onnx", images=100)
    assert found.path == run / "exports" / f"{run.name}.onnx" and found.path.is_file()
    assert found.comparison.examples == 100 and found.deviation < 1e-5
    model, file = found.comparison.accuracy
    assert model == file > 0.1
    small = exports.main(str(run), "onnx", precision="int8", output=run.parent / "small.onnx")
    assert small.comparison.examples == 360 and small.path.is_file()
    assert abs(small.comparison.accuracy[0] - small.comparison.accuracy[1]) < 0.05


def test_a_network_is_shrunk_first(run, tmp_path):
    found = exports.main(str(run), "state-dict", shrink=True, images=50, output=tmp_path / "x.safetensors")
    assert found.deviation == 0 and "multiply-adds before" in str(found)


def test_what_is_not_possible(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="onnx"):
        exports.main(str(run), "onx")
    with pytest.raises(ValueError, match="precision='int4' is not possible for onnx; it can be float32 or int8"):
        exports.main(str(run), "onnx", precision="int4")
    with pytest.raises(ValueError, match="images=0"):
        exports.main(str(run), "onnx", images=0)
    with pytest.raises(ValueError, match="sparsity=1"):
        exports.main("resnet20", "onnx", sparsity=1)
    assert list(tmp_path.iterdir()) == []
