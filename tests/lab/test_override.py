"""A sweep takes settings like `granet train` does."""

import pytest

from granet.cli import main
from granet.lab import override
from granet.lab.sweep import grid

VALUES = {
    "name": "mine",
    "recipe": "digits",
    "methods": ["dense", {"name": "granet", "label": "longer", "train.epochs": 9}],
    "grid": {"method.sparsity": [0.9, 0.98], "train.epochs": 2},
    "seeds": [0, 1],
}


@pytest.fixture
def sweep(tmp_path):
    return grid.parse(VALUES, source=tmp_path / "mine.toml")


def test_a_setting_replaces_that_of_the_grid_and_of_every_method(sweep):
    changed = override.laid_over(sweep, {"train.epochs": ["3"], "method.sparsity": ["0.5", "0.8"]}, [7])
    found = [(cell.label, cell.at("train.epochs"), cell.at("method.sparsity")) for cell in grid.cells(changed)]
    assert found == [("dense", 3, None), ("longer", 3, 0.5), ("longer", 3, 0.8)]
    assert {cell.recipe.seed for cell in grid.cells(changed)} == {7}
    assert not any(cell.apart for cell in grid.cells(changed))
    assert changed.name == "mine,train.epochs=3,method.sparsity=0.5+0.8,seeds=7"
    assert override.laid_over(sweep, {}) is sweep


def test_a_setting_that_is_a_list_stays_one(sweep):
    changed = override.laid_over(sweep, {"train.milestones": ["1ep", "50%"], "model.keep_dense": ["head.*"]})
    (cell, *_) = grid.cells(changed)
    assert (cell.at("train.milestones"), cell.at("model.keep_dense")) == (("1ep", "50%"), ("head.*",))


@pytest.mark.parametrize("word", ["null", "None"])
def test_null_is_written_as_in_yaml_or_as_in_python(sweep, word):
    (cell, *_) = grid.cells(override.laid_over(sweep, {"train.ema": [word]}))
    assert cell.recipe.train.ema is None


def test_names_stay_names(sweep):
    assert override.laid_over(sweep, {"data.root": ["/data/../x"]}).name == "mine"
    assert len(override.laid_over(sweep, {"train.milestones": [f"{i}it" for i in range(99)]}).name) < 20
    assert "/" not in override.laid_over(sweep, {"model.keep_dense": ["a/../b"]}).name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train.epoch", "3"], "train.epoch: there is no such key; did you mean 'epochs'?"),
        (["--method.sparsty", "0.3"], "no method here has method.sparsty; did you mean 'method.sparsity'?"),
        (["--train.epochs"], "--train.epochs needs a value"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--seed", "3"], "granet sweep has no option --seed; did you mean --seeds?"),
        (["--epochs", "3"], "granet sweep has no option --epochs; did you mean --train.epochs?"),
    ],
)
def test_wrong_settings_are_said(capsys, words, says):
    assert main(["sweep", "digits", "--dry-run", *words]) == 2
    assert says in capsys.readouterr().err


def test_the_command_lists_the_runs_that_it_would_train(capsys):
    assert main(["sweep", "digits", "--train.epochs", "3", "--seeds", "4", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all("seed 4" in line for line in lines)
