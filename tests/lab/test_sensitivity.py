import pytest
import torch

from granet.cli import main
from granet.lab.plasticity.cell import Bench
from granet.lab.sensitivity import layer_sensitivity
from granet.topology import count
from granet.train import checkpoint, recipes
from granet.train.checkpoint import CheckpointError
from granet.train.recipe import RecipeError, validate
from granet.train.run import Run, execute


def recipe(model="mlp", **train):
    settings = {"epochs": 2, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu"} | train
    method = {"name": "static", "sparsity": 0.6, "distribution": "uniform"}
    values = {"name": "x", "data": {"name": "digits"}, "model": {"name": model}, "method": method, "train": settings}
    return validate(values, source="test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run.for_recipe(recipe(), tmp_path_factory.mktemp("runs"))
    execute(run)
    return run


def test_accuracies_are_those_of_the_network_with_one_layer_pruned(run):
    from granet.train.trainer import Trainer

    found = layer_sensitivity(run, sparsities=(0.5, 0.9, 0.99))
    trainer, last = Trainer(run.recipe), checkpoint.load_latest(run.checkpoints)
    trainer.load_state_dict(last.model, last.state)
    assert found.accuracy == run.summary["last"]["test_accuracy"] == trainer.evaluate("test").accuracy
    assert {point.sparsity for point in found.points} == {0.9, 0.99}  # below 0.6 there is nothing to prune
    for point in found.points:
        trainer.load_state_dict(last.model, last.state)
        weight = dict(trainer.model.named_parameters())[point.layer].detach()
        threshold = weight.abs().flatten().sort(descending=True).values[point.active - 1]
        weight[weight.abs() < threshold] = 0
        assert torch.count_nonzero(weight) == point.active
        assert point.accuracy == trainer.evaluate("test").accuracy
    assert found.points[0].accuracy != found.points[1].accuracy


def test_it_depends_on_batch_norm_statistics(tmp_path):
    run = Run.for_recipe(recipe("digits-cnn"), tmp_path)
    execute(run)
    as_trained = layer_sensitivity(run, sparsities=(0.95,))
    recomputed = layer_sensitivity(run, sparsities=(0.95,), batch_norm=4)
    assert as_trained.accuracy == recomputed.accuracy
    assert [p.accuracy for p in as_trained.points] != [p.accuracy for p in recomputed.points]
    assert "recomputed on 4 batches" in str(recomputed)


def test_the_command(run, capsys, tmp_path):
    assert main(["sensitivity", str(run.path), "--sparsities", "0.9", "0.98", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2.weight" in out
    assert (tmp_path / "sensitivity.csv").read_text().count("\n") == 1 + 3 * 2
    assert (tmp_path / "sensitivity.svg").read_text().startswith("<svg")
    assert "2.weight" in (tmp_path / "sensitivity.html").read_text()


def test_what_cannot_be_measured_says_why(run, tmp_path):
    with pytest.raises(ValueError, match=r"above 0 and below 1, not 1\.5"):
        layer_sensitivity(run, sparsities=(1.5,))
    with pytest.raises(ValueError, match="is empty"):
        layer_sensitivity(run, sparsities=())
    with pytest.raises(ValueError, match=r"sparser than 0\.5: ask for higher"):
        layer_sensitivity(run, sparsities=(0.5,))
    with pytest.raises(ValueError, match="mlp has no batch norm"):
        layer_sensitivity(run, batch_norm=2)
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        layer_sensitivity(tmp_path)
    values = recipes.load("digits", method="str").model_dump()
    (tmp_path / "recipe.yaml").write_text(validate(values, source="test").to_yaml())
    with pytest.raises(RecipeError, match=r"trains more than its weights \(str\)"):
        Bench(Run.open(tmp_path))


@pytest.mark.parametrize("model", ["mlp", "digits-cnn"])  # of the second one layer does not fit the pattern
def test_a_network_under_a_pattern_is_pruned_weight_by_weight(model, tmp_path):
    values = recipe(model).model_dump()
    values["model"] |= {"pattern": "2:4"}
    values["method"] = {"name": "static", "sparsity": 0.5}
    finished = Run.for_recipe(validate(values, source="test"), tmp_path)
    execute(finished)
    masks = checkpoint.load_latest(finished.checkpoints).state["sparsifier"]["masks"]
    assert {point.layer for point in layer_sensitivity(finished.path, sparsities=(0.9,)).points} == set(masks)


def test_the_best_checkpoint(run):
    assert layer_sensitivity(run, sparsities=(0.9,), which="best").accuracy == run.summary["best"]["test_accuracy"]
    assert count(checkpoint.load_latest(run.checkpoints).state["sparsifier"]["masks"]["2.weight"]) > 0
