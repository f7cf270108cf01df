"""A study as a whole, from Python."""

import inspect
import shutil

import pytest

from granet import lab
from granet.lab.plasticity import run as plasticity_run
from granet.lab.plasticity.page import figure
from granet.lab.plasticity.study import Study, StudyError
from granet.train.recipe import RecipeError


@pytest.mark.parametrize("name", lab.__all__)
def test_functions_for_notebooks_are_functions(name):
    """Also where a folder of the laboratory has a similar name."""
    assert inspect.isfunction(getattr(lab, name))


@pytest.mark.slow
def test_in_a_notebook(tmp_path, recipe):
    found = lab.pruning_plasticity(
        recipe(epochs=2), at=("1",), retrain="1", prune=(0.5,), regenerate=("none",), pretrained_sparsity=(0,),
        seeds=(0, 1), out=tmp_path, jobs=2,
    )  # fmt: skip
    assert [row.seed for row in found.rows] == [0, 1]
    assert found.to_csv(tmp_path / "x.csv") == (tmp_path / "x.csv").read_text()
    assert "pretrained" in str(found)
    spec = figure(found, "final_gap").to_dict()
    values = spec["data"]["values"]  # of the only panel
    assert [value["seeds"] for value in values] == [2]
    assert values[0]["low"] <= values[0]["mean"] <= values[0]["high"]
    with pytest.raises(ValueError, match="no measure 'gap'"):
        figure(found, "gap")


def test_runs_that_cannot_be_studied_say_why(tmp_path, run, recipe):
    with pytest.raises(RecipeError, match="there is no recipe 'digitz'"):
        plasticity_run.plan("digitz")
    with pytest.raises(StudyError, match=r"no checkpoint at step 30; it has 20, 40, 60, 80"):
        plasticity_run.plan(run.path, Study(at=("1.5",)))
    assert plasticity_run.plan(run.path).steps == (20, 40, 60, 80)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text(recipe().to_yaml())
    with pytest.raises(StudyError, match="is not finished: `granet resume"):
        plasticity_run.plan(unfinished)
    shutil.copy(run.path / "summary.json", unfinished)
    with pytest.raises(StudyError, match="has no checkpoints, so there is nothing to prune"):
        plasticity_run.plan(unfinished)


@pytest.mark.parametrize(("images", "tested"), [(None, 360), (50, 50), (5_000, 360)])
def test_the_noise_is_that_of_the_images_that_are_looked_at(recipe, images, tested):
    assert plasticity_run.plan(recipe(evaluate_images=images)).tested == tested
