import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from granet.lab import sources
from granet.pattern import parse

CODE = """
import torch
from torch import nn

from neighbour import WIDTH


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))


def with_inputs():
    return network(), torch.arange(12.0).view(2, 6)


class Two(nn.Module):
    def forward(self, a, b):
        return a @ b.mT


def two_inputs():
    return Two(), (torch.ones(2, 3, 4), torch.ones(2, 5, 4))


def a_dict():
    return {}


def embedding():
    return nn.Embedding(5, 3)


def fails():
    return 1 / 0
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("WIDTH = 8")
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "neighbour", "granet_source_mine"):
        sys.modules.pop(name, None)


def zeros(model):
    weights = [p for p in model.parameters() if p.dim() > 1]
    return 1 - sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)


def test_a_model_by_name_has_random_masks_and_outputs_of_usual_size():
    found = sources.read("resnet20", sparsity=0.95, batch=2, size=16)
    assert found.example[0].shape == (2, 3, 16, 16)
    assert zeros(found.model) == pytest.approx(0.95, abs=1e-3)
    with torch.no_grad():
        assert 0.01 < found.model(*found.example).std() < 100
    assert not found.model.training and found.trainer is None


def test_masks_of_a_pattern():
    found = sources.read("resnet20", sparsity=0.9, pattern="1x4")
    weights = {name: p for name, p in found.model.named_parameters() if p.dim() > 1}
    form = parse("1x4")
    fitting = [p for p in weights.values() if form.misfit(tuple(p.shape)) is None]
    assert len(fitting) == len(weights) - 1  # three input channels cannot be parted into fours
    assert all(form.obeyed(p != 0) for p in fitting)
    assert zeros(found.model) == pytest.approx(0.9, abs=5e-3)


def test_what_a_function_returns(code):
    for source in ("mine:network", "mine.py:network", f"{code}/mine.py:network"):
        found = sources.read(source, batch=3)
        assert found.example[0].shape == (3, 6) and zeros(found.model) == 0
    assert str(code) not in sys.path
    assert sources.read("mine:with_inputs").example[0].tolist() == torch.arange(12.0).view(2, 6).tolist()
    assert sources.read("mine:with_inputs", batch=3).example[0][2].tolist() == list(range(6))
    assert [tuple(one.shape) for one in sources.read("mine:two_inputs", batch=1).example] == [(1, 3, 4), (1, 5, 4)]
    assert zeros(sources.read("mine:network", sparsity=0.75).model) == 0.75


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("resnet21", "unknown model 'resnet21'.*did you mean 'resnet20'.*timm:NAME"),
        ("mine:netwrok", "unknown function of mine 'netwrok'.*did you mean 'network'"),
        ("none:network", "No module named 'none'"),
        ("none.py:network", "there is no file none.py"),
        ("mine:a_dict", "mine:a_dict returns a dict: it must return a torch.nn.Module"),
        ("mine:fails", "mine:fails failed: ZeroDivisionError"),
        ("mine:embedding", "does not tell them: return both"),
        ("none.onnx", "none.onnx: there is no such file"),
    ],
)
def test_what_cannot_be_a_source(code, source, says):
    with pytest.raises((ValueError, OSError, ModuleNotFoundError), match=says):
        sources.read(source)


@pytest.mark.parametrize("option", [{"batch": 0}, {"size": 0}, {"sparsity": 1}, {"sparsity": -0.1}])
def test_impossible_numbers(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}="):
        sources.read("resnet20", **option)


def test_inputs_that_do_not_fit_are_said(code):
    (code / "wrong.py").write_text("import torch\ndef make(): return torch.nn.Linear(3, 2), torch.ones(1, 4)")
    with pytest.raises(ValueError, match="cannot compute inputs of shape 1x4: RuntimeError"):
        sources.read("wrong.py:make")


def test_models_of_timm():
    pytest.importorskip("timm", reason="needs the extra granet[timm]")
    found = sources.read("timm:test_resnet", sparsity=0.5)
    assert found.example[0].shape == (1, 3, 160, 160) and zeros(found.model) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match=r"timm has no model 'resnet18x'.*resnet18"):
        sources.read("timm:resnet18x")


def test_models_of_torchvision():
    pytest.importorskip("torchvision", reason="needs torchvision")
    found = sources.read("torchvision:squeezenet1_1", size=64)
    assert found.example[0].shape == (1, 3, 64, 64) and zeros(found.model) == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ValueError, match=r"torchvision has no model 'resnet19'.*resnet18"):
        sources.read("torchvision:resnet19")


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="reading it needs no_such_package: pip install something"):
        sources.require("no_such_package", "reading it", "something")


@pytest.mark.filterwarnings("ignore")  # those of the exporter
def test_an_onnx_file(tmp_path):
    for package in ("onnx", "onnxscript", "onnx2torch"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install onnx2torch onnxscript")
    from granet import export

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    with torch.no_grad():
        model[3].weight[:, ::2] = 0
    path = tmp_path / "model.onnx"
    export.onnx(model, torch.randn(2, 3, 8, 8), path)
    found = sources.read(str(path), batch=4)
    assert found.example[0].shape == (4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(found.model(*found.example), model(*found.example), atol=1e-5)
    assert zeros(found.model) > 0.4
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no ONNX file that can be read"):
        sources.read(str(path))
