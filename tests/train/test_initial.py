"""A training goes on beyond its recipe, or begins with the weights of another run."""

import json
from pathlib import Path

import pytest
import torch

from granet.cli import main
from granet.train import checkpoint
from granet.train.initial import longer, source
from granet.train.recipe import RecipeError, validate
from granet.train.run import Run, execute, extend
from granet.train.trainer import Trainer

GRANET = {"name": "granet", "sparsity": 0.9, "end": "60%", "interval": "7it"}


def recipe(method=GRANET, model="mlp", seed=0, **train):
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu", "log": "7it"} | train
    values = {"data": {"name": "digits"}, "model": {"name": model}, "method": dict(method), "seed": seed}
    return validate(values | {"train": settings}, source="test")


def records(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def source_run(tmp_path_factory):
    run = Run.for_recipe(recipe(), tmp_path_factory.mktemp("source"))
    execute(run)
    return run


@pytest.mark.parametrize(
    "train",
    [{"schedule": "multistep"}, {"schedule": "cosine", "warmup": "10%", "keep": ("25%",)}, {"schedule": "constant"}],
    ids=lambda train: train["schedule"],
)
def test_an_extended_run_is_the_one_that_its_recipe_makes_from_scratch(tmp_path, train):
    first = Run.for_recipe(recipe(**train), tmp_path)
    execute(first)
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    second = Run.open(extend(first, 2))
    assert second.path.parent == first.path.parent and second.path != first.path
    summary = execute(second)
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == before
    assert summary["steps"] == 40 and summary["epochs"] == 2
    scratch = Run.for_recipe(second.recipe, tmp_path / "scratch")
    execute(scratch)
    assert records(second) == records(scratch)
    one, other = (checkpoint.load_latest(run.checkpoints) for run in (second, scratch))
    assert all(torch.equal(one.model[name], other.model[name]) for name in other.model)
    assert Run.open(extend(first, 2)).summary is not None  # made once


def test_the_method_and_its_milestones_stay_at_their_steps():
    short = recipe(milestones=("50%", "1ep"), checkpoint="10%")
    long = longer(short, 4, 20)
    assert (long.method.end, long.method.total, long.method.interval) == (12, 20, "7it")
    assert (long.train.milestones, long.train.checkpoint, long.train.stages) == ((10, "1ep"), 2, (20,))
    assert longer(long, 6, 20).train.stages == (20, 80)
    assert longer(long, 6, 20).method == long.method
    with pytest.raises(RecipeError, match="the run has 1 epochs: 1 would not make it longer"):
        longer(short, 1, 20)


def test_the_learning_rate_of_each_stage():
    from granet.train.optimizer import learning_rate

    for schedule in ("multistep", "cosine", "constant"):
        short = recipe(schedule=schedule).train
        units = {"steps_per_epoch": 20, "epochs": 1}
        settings = type(short).model_construct(**short.resolved(**units))
        long = longer(recipe(schedule=schedule), 2, 20).train
        extended = type(long).model_construct(**long.resolved(steps_per_epoch=20, epochs=2))
        rates = [learning_rate(extended, step, 40) for step in range(40)]
        assert rates[:20] == [learning_rate(settings, step, 20) for step in range(20)]
        if schedule == "cosine":
            plain = extended.model_copy(update={"stages": ()})
            assert rates[20:] == [learning_rate(plain, step, 40) for step in range(20, 40)]
        else:
            assert set(rates[20:]) == {rates[19]}


def test_a_run_that_was_stopped_can_be_extended_too(tmp_path):
    first = Run.for_recipe(recipe(), tmp_path)
    calls = []
    assert execute(first, stop=lambda: calls.append(1) or len(calls) == 9) is None
    second = Run.open(extend(first, 2))
    execute(second)
    scratch = Run.for_recipe(second.recipe, tmp_path / "scratch")
    execute(scratch)
    assert records(second) == records(scratch)


def test_resume_with_more_epochs(source_run, capsys, tmp_path):
    assert main(["resume", str(source_run.path), "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 40/40" in out
    assert len(list(source_run.path.parent.iterdir())) == 2
    assert main(["resume", str(source_run.path), "--epochs", "1"]) == 2
    assert "the run has 1 epochs: 1 would not make it longer" in capsys.readouterr().err


def test_a_training_begins_with_the_weights_of_another_run(source_run):
    found = checkpoint.pick(source_run.checkpoints)
    for method in ({"name": "dense"}, {"name": "static", "sparsity": 0.8}, {"name": "fixed"}):
        trainer = Trainer(recipe(method, seed=3, init=str(source_run.path)))
        for name, tensor in trainer.model.state_dict().items():
            mask = trainer.sparsifier.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
            assert torch.equal(tensor, found.model[name].where(mask, 0))
    assert all(torch.equal(mask, found.masks[name]) for name, mask in trainer.sparsifier.masks.items())


def test_a_probe_looks_at_the_weights_that_the_training_begins_with(source_run):
    snip = {"name": "snip", "sparsity": 0.95}
    fresh, begun = (Trainer(recipe(snip, init=init)).sparsifier.masks for init in (None, str(source_run.path)))
    assert any(not torch.equal(fresh[name], begun[name]) for name in fresh)


def test_the_command_names_the_checkpoint_in_the_recipe_and_goes_on_without_it(source_run, capsys, tmp_path):
    words = [
        "train",
        "digits",
        "--method",
        "fixed",
        "--model.name",
        "mlp",
        "--train.epochs",
        "1",
        "--train.warmup",
        "0",
    ]
    words += ["--init-from", str(source_run.path), "--runs", str(tmp_path)]
    assert main(words) == 0
    (path,) = tmp_path.iterdir()
    assert Run.open(path).recipe.train.init == str(source(source_run.path))
    assert Run.open(path).summary["sparsity"] == pytest.approx(0.9, abs=1e-4)
    file = path / "recipe.yaml"
    file.write_text(file.read_text().replace(str(source_run.path), "gone"))
    assert main(["eval", str(path)]) == 0  # a run that has begun does not need the other one


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"init": "nowhere"}, "nowhere is neither a run directory nor a checkpoint"), ({}, "holds another network")],
)
def test_weights_that_cannot_be_had_are_said(source_run, tmp_path, changes, says):
    run = Run.for_recipe(recipe(model="digits-cnn", **({"init": str(source_run.path)} | changes)), tmp_path)
    with pytest.raises((RecipeError, FileNotFoundError), match=says):
        execute(run)
    assert not list(Path(tmp_path).iterdir())
