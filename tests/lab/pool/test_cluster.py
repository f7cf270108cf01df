"""Ray and submitit on this machine; each in a process of its own, so that nothing of theirs stays in ours."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from granet.lab.sweep import grid
from granet.train import checkpoint

HERE = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='pip install "granet[ray]"')
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason='pip install "granet[slurm]"')

PROGRAM = """
import json, sys
from pathlib import Path
from granet.lab.sweep import grid
from granet.lab.sweep import run as sweep

values = {
    "name": "tiny", "recipe": "digits", "methods": ["static"], "seeds": [0, 1],
    "grid": {"model.name": "mlp", "train.epochs": 1, "train.warmup": 0},
}
runs = Path(sys.argv[2])
todo = sweep.planned(grid.cells(grid.parse(values, source=Path("tiny.toml"))), runs)
broken = todo[0].run.path
broken.mkdir(parents=True)
(broken / "checkpoints").write_text("in the way")
options = json.loads(sys.argv[3])
ended = list(sweep.run(todo, executor=sys.argv[1], jobs=2, options=options))
print(json.dumps({done.run.path.name: [done.error, done.summary and done.summary["steps"]] for done in ended}))
"""


def run_program(text, executor, tmp_path, options):
    program = tmp_path / "program.py"
    program.write_text(text)
    command = [sys.executable, str(program), executor, str(tmp_path / "runs"), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sweep_by(executor, tmp_path, **options):
    return run_program(PROGRAM, executor, tmp_path, options)


def check(ended, runs):
    (bad, (error, none)), (good, (fine, steps)) = sorted(ended.items(), key=lambda item: item[1][0] is None)
    assert none is None and "checkpoints" in error
    assert (runs / bad / "error.txt").read_text().strip() == error
    assert (fine, steps) == (None, 20)
    assert json.loads((runs / good / "summary.json").read_text())["steps"] == 20


@needs_ray
@pytest.mark.slow
def test_a_sweep_on_a_local_ray(tmp_path):
    check(sweep_by("ray", tmp_path), tmp_path / "runs")


@needs_submitit
@pytest.mark.slow
def test_a_sweep_by_submitits_local_executor(tmp_path):
    ended = sweep_by("slurm", tmp_path, cluster="local", folder=str(tmp_path / "logs"), timeout_min=10)
    check(ended, tmp_path / "runs")
    assert list((tmp_path / "logs").glob("*_result.pkl"))


CALLED_OFF = """
import json, sys
from pathlib import Path
from granet.lab.sweep import grid
from granet.lab.sweep import run as sweep

values = {
    "name": "long", "recipe": "digits", "methods": ["static"],
    "grid": {"model.name": "mlp", "train.epochs": 2000, "train.warmup": 0},
}
todo = sweep.planned(grid.cells(grid.parse(values, source=Path("long.toml"))), Path(sys.argv[2]))
begun = (todo[0].run.path / "checkpoints" / "00000040").exists
(done,) = sweep.run(todo, executor=sys.argv[1], jobs=1, options=json.loads(sys.argv[3]), stop=begun)
print(json.dumps([done.summary, done.error, (done.run.path / "error.txt").exists()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "executor", [pytest.param("ray", marks=needs_ray), pytest.param("slurm", marks=needs_submitit)]
)
def test_a_run_that_is_called_off_has_not_failed(tmp_path, executor):
    options = {"slurm": {"cluster": "local", "folder": str(tmp_path / "logs"), "timeout_min": 10}, "ray": {}}[executor]
    assert run_program(CALLED_OFF, executor, tmp_path, options) == [None, None, False]
    (run,) = (tmp_path / "runs").iterdir()
    assert checkpoint.load_latest(run / "checkpoints").step >= 40
    assert not (run / "summary.json").exists()


@needs_submitit
def test_options_that_submitit_does_not_know_are_named(tmp_path):
    from granet.lab import pool

    with pytest.raises(ValueError, match=r"submitit cannot use cluster 'local' with \{'timout': 3\}"):
        next(
            pool.map(grid.names, [()], executor="slurm", options={"cluster": "local", "folder": tmp_path, "timout": 3})
        )


@needs_submitit
def test_a_job_whose_time_is_up_is_queued_again_with_its_arguments():
    from granet.lab.pool.cluster import Again

    again = Again(divmod).checkpoint(7, 2)
    assert again.result() == (3, 1)
    assert callable(again.function.checkpoint)
