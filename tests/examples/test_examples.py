"""Every example runs for a few steps, and does what it says. Notebooks are run too, shortened."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch):
    """Examples import one another by name, as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(name, *arguments):
    return importlib.import_module(name).main(list(arguments))


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"text"}  # which the language models share
    assert {name for name in scripts if f'"{name}"' not in source} == set()


def test_image_classifier():
    results = run("image_classifier", "--steps", "40")
    assert results["dense"][1] == 0
    for name in ("RigL", "GraNet"):
        accuracy, sparsity = results[name]
        assert sparsity == pytest.approx(0.9, abs=1e-4) and accuracy > 0.2


def test_character_gpt():
    assert run("character_gpt", "--steps", "30") < 3.5  # a uniform guess has 4.6


def test_lstm_language_model():
    results = run("lstm_language_model", "--steps", "20")
    assert results["GMP"][1] == pytest.approx(0.9, abs=1e-4) == results["GraNet"][1]
    assert all(loss < 4 for loss, _ in results.values())


def test_gan():
    _, generator, discriminator = run("gan", "--steps", "20")
    assert generator == pytest.approx(0.8, abs=1e-3) == discriminator


@pytest.mark.parametrize("model", ["vit", "mixer"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_vision_transformer(model):
    pytest.importorskip("timm", reason='needs pip install "granet[timm]"')
    _, sparsity = run("vision_transformer", "--model", model, "--steps", "10")
    assert sparsity == pytest.approx(0.8, abs=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_lora_finetuning():
    pytest.importorskip("peft", reason='needs pip install "granet[peft]"')
    before, after = run("lora_finetuning", "--steps", "10")
    assert before == pytest.approx(0.7, abs=1e-3) and after == before


def test_own_method():
    results = run("own_method", "--steps", "40")
    accuracy, sparsity = results["weakest-link"]
    assert sparsity == pytest.approx(0.9, abs=1e-4) and accuracy > 0.2


def test_plasticity_of_your_network():
    table = run("plasticity_of_your_network", "--epochs", "2", "--rates", "0.2", "0.98")
    assert set(table) == {(1, 0.2), (1, 0.98), (2, 0.2), (2, 0.98)}
    assert all(-100 <= value <= 100 for value in table.values())


def test_compile_and_measure():
    dense, fast, difference = run("compile_and_measure", "--batch", "1")
    assert dense > 0 and fast > 0 and difference < 1e-3


@pytest.mark.parametrize(
    ("name", "shorter"),
    [
        ("image_classifier", {"steps=300": "steps=20"}),
        ("plasticity_of_your_network", {'"--epochs", "6"': '"--epochs", "1"'}),
    ],
)
def test_notebooks_run_and_keep_their_pictures(name, shorter):
    nbformat = pytest.importorskip("nbformat", reason="needs the development tools")
    nbclient = pytest.importorskip("nbclient", reason="needs the development tools")
    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for cell in notebook.cells:
        for long, short in shorter.items():
            assert cell.cell_type != "code" or long not in cell.source or cell.source.count(long) == 1
            cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": EXAMPLES / "notebooks"}}).execute()
