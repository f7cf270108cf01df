"""Sharing: folders that others load again, with small weights, configuration and a model card."""

import json

import pytest
import torch
import yaml
from torch import nn

import granet
from granet.cli import main
from granet.hub.mixin import WEIGHTS
from granet.train.recipe import validate
from granet.train.run import Run, execute
from granet.train.trainer import Trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of one epoch, the second with averaged weights, by name."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    method = {"name": "static", "sparsity": 0.9}
    for name, changed in (("plain", {}), ("average", {"ema": 0.9})):
        train = {"epochs": 2, "batch_size": 32, "lr": 0.1, "threads": 1, "device": "cpu"} | changed
        values = {"name": name, "data": {"name": "digits"}, "model": {"name": "mlp"}, "method": method, "train": train}
        found[name] = Run.for_recipe(validate(values, source="test"), folder)
        execute(found[name])
    return found


class Classifier(nn.Module, granet.hub.SparseHubMixin):
    def __init__(self, width: int, classes: int = 10):
        super().__init__()
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x).relu())


def test_a_class_of_ones_own(tmp_path):
    model = Classifier(64, classes=7)
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.9))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    assert (tmp_path / WEIGHTS).stat().st_size < 0.3 * 4 * sum(p.numel() for p in model.parameters())
    other = Classifier.from_pretrained(tmp_path)
    assert other.head.out_features == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    text = (tmp_path / "README.md").read_text()
    assert "Static(sparsity=0.9" in text and "Classifier.from_pretrained" in text
    assert f"{sparsifier.active:,}" in text or "| body.weight |" in text


@pytest.mark.parametrize("name", ["plain", "average"])
def test_a_run_is_shared_with_the_accuracy_of_its_card(runs, name, tmp_path):
    run = runs[name]
    assert main(["share", str(run.path), str(tmp_path / "shared")]) == 0
    network = granet.hub.Network.from_pretrained(tmp_path / "shared")
    data = Trainer(run.recipe, begins=False).dataset
    images, labels = data.test.images.float() / 255, data.test.labels
    with torch.no_grad():
        accuracy = (network(images).argmax(dim=1) == labels).float().mean().item()
    summary = run.summary
    assert accuracy == pytest.approx((summary["best"] or summary["last"])["test_accuracy"], abs=1e-6)
    text = (tmp_path / "shared" / "README.md").read_text()
    assert f"| {accuracy:>8.2%} |" in text
    metadata = yaml.safe_load(text.split("---")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(accuracy, abs=1e-6)
    assert result["dataset"]["split"] == "test"
    for layer in summary["layers"]:
        assert f"{layer['active']:,}" in text
    assert json.loads((tmp_path / "shared" / "summary.json").read_text()) == summary
    assert main(["show", str(tmp_path / "shared" / "recipe.yaml")]) == 0


def test_a_loaded_network_is_saved_again_with_its_card(runs, tmp_path):
    granet.hub.Network.from_run(runs["plain"].path, "last").save_pretrained(tmp_path / "one")
    granet.hub.Network.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("README.md", "recipe.yaml", "summary.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_cannot_be_shared_or_loaded_is_refused(runs, tmp_path, capsys):
    run = runs["plain"]
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text((run.path / "recipe.yaml").read_text())
    assert main(["share", str(unfinished), str(tmp_path / "x")]) == 2
    assert "is not finished" in capsys.readouterr().err
    assert main(["share", str(run.path), str(tmp_path / "x"), "--private"]) == 2
    assert "--push" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

    granet.hub.Network.from_run(run.path).save_pretrained(tmp_path / "shared")
    weights = tmp_path / "shared" / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=WEIGHTS):
        granet.hub.Network.from_pretrained(tmp_path / "shared")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.granet.safetensors.*it holds .*config.json"):
        granet.hub.Network.from_pretrained(tmp_path / "shared")


def test_a_model_of_transformers_comes_back_as_dense_and_as_sparse(tmp_path):
    transformers = pytest.importorskip("transformers", reason="it is in the test set-up's integrations")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    conv1d = transformers.pytorch_utils.Conv1D
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.9), only=conv1d)
    tokens = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        expected = model(tokens).logits

        granet.hub.save_transformers(model, tmp_path / "small")
        small = granet.hub.load_transformers(tmp_path / "small")
        assert torch.equal(small(tokens).logits, expected)
        assert small.lm_head.weight is small.transformer.wte.weight

        model.save_pretrained(tmp_path / "dense")  # transformers' own
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        assert torch.equal(dense(tokens).logits, expected)
    for loaded in (small, dense):
        again = granet.Sparsifier(loaded, granet.Fixed(), only=conv1d)
        assert {n: int(m.sum()) for n, m in again.masks.items()} == {
            n: int(m.sum()) for n, m in sparsifier.masks.items()
        }

    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    with pytest.raises(ValueError, match="'Unheard' as architecture"):
        granet.hub.load_transformers(tmp_path / "small")
    with pytest.raises(TypeError, match=r"a transformers\.PreTrainedModel is needed"):
        granet.hub.save_transformers(nn.Linear(2, 2), tmp_path / "other")
