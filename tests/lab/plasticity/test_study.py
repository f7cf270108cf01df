"""The grid of a study, the names of its cells, and what a name stands for."""

import dataclasses

import pytest

from granet.lab.plasticity import study as plasticity_study
from granet.lab.plasticity.study import PRESETS, Cell, Study, StudyError, is_run, moments


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regenerate": ("retore",)}, "no arm 'retore' of regeneration; did you mean 'restore'"),
        ({"prune": (0.5, 1.0)}, "above 0 and below 1, got 1.0"),
        ({"pretrained_sparsity": (1.0,)}, "from 0 and below 1, got 1.0"),
        ({"scope": "locally"}, "scope 'locally' is not possible"),
        ({"exchange": 0.0}, "exchange is a share"),
        ({"batches": 0}, "at least one"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_impossible_studies_are_refused(changes, says):
    with pytest.raises(StudyError, match=says):
        Study(**changes)


def test_a_study_is_meant_where_a_folder_has_its_name(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plasticity-digits").mkdir()
    (tmp_path / "other").mkdir()
    assert not is_run("plasticity-digits") and not is_run("digits") and not is_run("nowhere")
    assert is_run("other") and is_run(run.path)


def test_a_cell_is_named_by_all_that_it_depends_on_and_nothing_else(tmp_path, recipe):
    base, one = recipe(), Cell("runs/a", 20, 0.5, "equal", "global", 20, 1, 0.5)
    file = one.file(tmp_path, base)
    quiet = base.model_copy(update={"train": base.train.model_copy(update={"keep": ("7ep",), "log": 3})})
    assert dataclasses.replace(one, run="elsewhere/a").file(tmp_path, quiet) == file
    for change in ({"step": 40}, {"rate": 0.2}, {"arm": "restore"}, {"scope": "layerwise"}, {"retrain": 10},
                   {"batches": 2}, {"exchange": 0.3}):  # fmt: skip
        assert dataclasses.replace(one, **change).file(tmp_path, base) != file
    assert one.file(tmp_path, base.model_copy(update={"seed": 1})) != file
    plain = dataclasses.replace(one, arm="none")
    assert dataclasses.replace(plain, batches=9, exchange=0.1).file(tmp_path, base) == plain.file(tmp_path, base)


@pytest.mark.parametrize("name", PRESETS)
def test_the_studies_of_the_package_are_possible(name):
    source, study = PRESETS[name]
    steps = moments(study, plasticity_study.load_recipe(source), 100)
    assert len(steps) == len(study.at)


def test_the_papers_study_has_the_papers_grid():
    source, study = plasticity_study.resolve("resnet20-paper")
    base = plasticity_study.load_recipe(source)
    assert (base.model.name, base.data.name, base.train.epochs, base.train.milestones) == (
        "resnet20", "cifar10", 160, ("50%", "75%"),
    )  # fmt: skip
    assert study.prune == study.pretrained_sparsity[1:2] * 0 + (0.2, 0.5, 0.9, 0.98)
    assert study.pretrained_sparsity == (0.0, 0.5, 0.9, 0.98)
    assert moments(study, base, 351)[0] == 3510
    assert plasticity_study.retraining(study, base, 351) == 30 * 351
