"""Quantisation-aware training by a recipe: masks stay, runs go on to the bit, and the result is a plain network."""

import pytest
import torch

from granet.cli import main
from granet.lab.bench import command
from granet.train import checkpoint
from granet.train.recipe import RecipeError, validate
from granet.train.run import Run, execute, load_weights
from granet.train.trainer import Trainer

SPARSE = {"name": "granet", "sparsity": 0.9, "end": "60%", "interval": "7it"}


def recipe(method=SPARSE, pattern="1x4", **train):
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu"} | train
    model = {"name": "digits-cnn", "pattern": pattern}
    values = {"data": {"name": "digits"}, "model": model, "method": dict(method), "train": settings}
    return validate(values, source="test")


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    run = Run.for_recipe(recipe(epochs=2), tmp_path_factory.mktemp("sparse"))
    execute(run)
    return run


def fine_tuning(run, **train):
    settings = {"init": str(run.path), "quantise": "int8", "lr": 0.01} | train
    return recipe({"name": "fixed"}, **settings)


def test_fine_tuning_keeps_masks_and_names_and_can_be_compiled(sparse_run, tmp_path):
    run = Run.for_recipe(fine_tuning(sparse_run), tmp_path)
    summary = execute(run)
    before, after = (checkpoint.pick(r.checkpoints, "last") for r in (sparse_run, run))
    assert before.model.keys() == after.model.keys() and before.masks.keys() == after.masks.keys()
    for name, mask in before.masks.items():
        assert torch.equal(mask, after.masks[name])
        assert not (after.model[name][~mask] != 0).any()
        assert not torch.equal(before.model[name], after.model[name])
    trainer = Trainer(run.recipe, begins=False)
    load_weights(run, trainer, "last")
    rounded = trainer.evaluate("test")
    assert rounded.accuracy == summary["last"]["test_accuracy"]
    trainer.quantisation.remove()
    assert trainer.evaluate("test").loss != rounded.loss
    options = {"engines": ["granet"], "precision": "int8", "seconds": 0.05, "batch": 8}
    found = command.main(str(run.path), **options)
    dense, compiled = found.rows
    assert found.images == 360 and abs(compiled.accuracy - rounded.accuracy) < 0.02
    assert dense.accuracy == pytest.approx(trainer.evaluate("test").accuracy, abs=1e-6)


@pytest.mark.parametrize("train", [{}, {"ema": 0.9}, {"accumulate": 2}], ids=str)
def test_a_run_goes_on_to_the_bit(train):
    whole, first, second = (Trainer(recipe(quantise="int8", lr=0.01, **train)) for _ in range(3))
    lines = [], []
    whole.fit(record=lines[0].append, save=lambda: None)
    assert not first.fit(record=lines[1].append, save=lambda: None, stop=lambda: first.step == 13)
    model = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    second.load_state_dict(model, first.state_dict())
    second.fit(record=lines[1].append, save=lambda: None)
    for one, other in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.quantisation.ranges, second.quantisation.ranges)
    assert not whole.quantisation.ranges.isnan().any()
    for record in (*lines[0], *lines[1]):
        record.pop("seconds", None)
    assert lines[0] == lines[1]


def test_a_checkpoint_without_ranges_does_not_fit():
    plain, rounding = Trainer(recipe()), Trainer(recipe(quantise="int8"))
    state = plain.state_dict() | {"sparsifier": rounding.state_dict()["sparsifier"]}
    with pytest.raises(ValueError, match="the ranges are those of no layer, and this model rounds features"):
        rounding.load_state_dict(plain.model.state_dict(), state)


def test_other_sparse_layers_than_there_are_masks_for_are_refused(sparse_run):
    with pytest.raises(RecipeError, match=r"of the pattern 1x4, features.0.weight is dense, and by this recipe"):
        Trainer(validate(fine_tuning(sparse_run).model_dump() | {"model": {"name": "digits-cnn"}}, source="test"))


@pytest.mark.parametrize("other", [{"bf16": True}, {"compile": "default"}, {"engine": "sparse"}], ids=str)
def test_what_does_not_go_with_rounding_is_refused(other):
    with pytest.raises(RecipeError, match="leave out bf16, compile and engine sparse"):
        recipe(quantise="int8", **other)


def test_an_unknown_precision_is_refused_with_those_there_are(capsys):
    with pytest.raises(RecipeError, match=r"train.quantise: 'int4' is not possible; did you mean 'int8'\?"):
        recipe(quantise="int4")
    assert main(["train", "digits", "--train.quantise", "int4"]) == 2
    assert "--train.quantise: 'int4' is not possible; did you mean 'int8'? (choices: " in capsys.readouterr().err
