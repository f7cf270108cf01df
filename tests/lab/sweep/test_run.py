import json
import shutil
import time
from pathlib import Path

import pytest

from granet.lab.sweep import grid
from granet.lab.sweep import run as sweep
from granet.lab.sweep.grid import SweepError
from granet.lab.sweep.run import check, planned, run
from granet.train.run import Run

VALUES = {
    "name": "tiny",
    "recipe": "digits",
    "methods": ["dense", {"name": "static", "label": "static"}],
    "grid": {"method.sparsity": [0.8, 0.9], "train": {"epochs": 1, "warmup": 0}, "model.name": "mlp"},
    "seeds": [0, 1],
}


def cells(**changes):
    return grid.cells(grid.parse(VALUES | changes, source=Path("tiny.toml")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole sweep, in two processes."""
    runs = tmp_path_factory.mktemp("runs")
    return list(run(planned(cells(), runs), jobs=2))


def test_every_cell_becomes_a_run(finished):
    assert len(finished) == 6
    for done in finished:
        assert done.error is None
        assert json.loads(json.dumps(done.summary)) == Run.open(done.run.path).summary
        assert Run.open(done.run.path).recipe == done.cell.recipe
        assert done.summary["sparsity"] == pytest.approx(done.cell.at("method.sparsity") or 0, abs=1e-3)


def test_what_is_finished_is_not_done_again(finished):
    runs = finished[0].run.path.parent
    began = time.time()
    again = list(run(planned(cells(), runs)))
    assert {d.run.path: d.summary for d in again} == {d.run.path: d.run.summary for d in finished}
    assert max(file.stat().st_mtime for file in runs.rglob("*")) < began


def test_the_result_does_not_depend_on_the_process(finished, tmp_path):
    done = next(done for done in finished if done.cell.label == "static")
    alone = sweep.run_cell(done.cell.recipe.to_yaml(), str(tmp_path))
    assert (alone["last"], alone["flops"]) == (done.summary["last"], done.summary["flops"])


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(tmp_path):
    longer = {"model.name": "mlp", "train": {"epochs": 60, "warmup": 0, "log": "1it"}}
    todo = planned(cells(methods=["dense"], grid=longer), tmp_path)
    logs = [done.run.path / "metrics.jsonl" for done in todo]
    stopped = list(run(todo, jobs=1, stop=logs[0].exists))
    assert [(done.summary, done.error) for done in stopped] == [(None, None)]
    assert not logs[1].exists()
    lines = logs[0].read_text().splitlines()
    step = json.loads(lines[-1])["step"]
    assert 0 < step < 1200
    ended = list(run(planned([done.cell for done in todo], tmp_path), jobs=2))
    assert [done.summary["steps"] for done in ended] == [1200, 1200]
    assert logs[0].read_text().splitlines()[: len(lines)] == lines  # gone on with, not begun anew


@pytest.mark.slow
def test_a_failed_run_keeps_what_it_said_and_the_rest_goes_on(tmp_path):
    todo = planned(cells(seeds=[0]), tmp_path)
    broken = todo[0].run.path
    broken.mkdir()
    (broken / "checkpoints").write_text("in the way of the folder")
    ended = {done.run.path: done for done in run(todo, jobs=2)}
    assert [path for path, done in ended.items() if done.error is not None] == [broken]
    assert [path for path, done in ended.items() if done.summary is None] == [broken]
    assert "checkpoints" in (broken / "error.txt").read_text().splitlines()[-1]
    (broken / "checkpoints").unlink()
    again = list(run(planned([done.cell for done in todo], tmp_path)))
    assert all(done.summary for done in again)
    assert not (broken / "error.txt").exists()


def test_a_network_that_a_method_does_not_fit_is_refused_before_anything_starts():
    # one weight in a hundred thousand: layers would be left with none
    found = cells(grid={"method.sparsity": [0.8, 0.99999], "train.epochs": 1})
    with pytest.raises(SweepError, match=r"digits, static, method\.sparsity 0\.99999, .*weight"):
        check(found)
    found = cells(methods=[{"name": "granet", "method.initial_sparsity": 0.85}])
    with pytest.raises(SweepError, match=r"digits, granet, method\.sparsity 0\.8, .*=0\.85 must not exceed"):
        check(found)
    with pytest.raises(SweepError, match="batch_size 9999 is larger than the training set"):
        check(cells(grid={"train.batch_size": 9999}))
    assert check(cells()) is None


def test_data_that_are_not_here_are_named(tmp_path):
    found = cells(recipe="cifar10-vgg19", grid={"data.root": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not on this machine. Download"):
        check(found)


def test_two_labels_for_one_run_are_refused(tmp_path):
    found = cells(methods=["static", {"name": "static", "label": "the same", "method.distribution": "erk"}])
    with pytest.raises(SweepError, match="'static' and 'the same' are the same run, digits-static-"):
        planned(found, tmp_path)


def test_a_job_leaves_the_number_of_threads_as_it_was(tmp_path):
    import torch

    before = torch.get_num_threads()
    recipe = cells(grid={"model.name": "mlp", "train": {"epochs": 1, "warmup": 0, "threads": before + 1}})[0].recipe
    assert sweep.run_cell(recipe.to_yaml(), str(tmp_path))
    assert torch.get_num_threads() == before
    assert json.loads(next(tmp_path.glob("*/environment.json")).read_text())["threads"] == before + 1
    shutil.rmtree(tmp_path)
