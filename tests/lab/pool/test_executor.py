import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from granet.lab import pool

sys.path.insert(0, str(Path(__file__).parents[1]))  # processes of the pool inherit it, and so find the jobs
import jobs


def test_every_argument_has_its_value():
    found = {outcome.argument: outcome.value for outcome in pool.map(jobs.square, [(i,) for i in range(7)], jobs=2)}
    assert found == {(i,): i * i for i in range(7)}
    assert not multiprocessing.active_children()


def test_processes_are_used_again_and_no_more_than_asked_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcomes = list(pool.map(jobs.where, [(i,) for i in range(6)], jobs=2))
    assert len({outcome.value[0] for outcome in outcomes}) <= 2
    assert {outcome.value[1] for outcome in outcomes} == {str(max(1, pool.cores() // 2))}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert next(pool.map(jobs.where, [(0,)], jobs=2)).value[1] == "7"


def test_jobs_run_at_the_same_time(tmp_path):
    outcomes = list(pool.map(jobs.meet, [(str(tmp_path), 3)] * 3, jobs=3))
    assert [outcome.value for outcome in outcomes] == [3, 3, 3]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "KeyError: 'raise'"),
        ("exit", "before it failed"),
        ("kill", "the process was ended by SIGKILL"),
        ("abort", "the process was ended by SIGABRT"),
    ],
)
def test_a_failed_job_tells_its_last_lines_and_the_rest_goes_on(how, said, capfd):
    outcomes = list(pool.map(jobs.fail, [(how,), (how,)], jobs=1))
    assert [outcome.argument for outcome in outcomes] == [(how,), (how,)]
    for outcome in outcomes:
        assert outcome.value is None
        assert "before it failed" in outcome.error
        assert said in outcome.error
    assert capfd.readouterr() == ("", "")


def test_stop_lets_jobs_end_by_themselves_and_starts_no_more(tmp_path):
    begun = lambda: len(list(tmp_path.glob("*.begun")))  # noqa: E731 (short, and used twice)
    outcomes = list(pool.map(jobs.until_asked, [(str(tmp_path),)] * 5, jobs=2, stop=lambda: begun() == 2))
    assert [outcome.value for outcome in outcomes] == ["saved", "saved"]
    assert begun() == 2


def test_leaving_early_leaves_no_process_behind(tmp_path):
    arguments = [(str(tmp_path),)] * 2
    outcomes = pool.map(jobs.until_asked, arguments, jobs=2, stop=lambda: len(list(tmp_path.glob("*"))) == 2)
    next(outcomes)
    outcomes.close()
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from granet.lab import pool

def children():
    return Path(f"/proc/{os.getpid()}/task/{threading.main_thread().native_id}/children").read_text().split()

def interrupt():
    deadline = time.monotonic() + 60
    while len(children()) < 2 and time.monotonic() < deadline:  # beside the tracker of resources
        pass
    for _ in range(20):  # all along the start of the process
        os.killpg(0, signal.SIGINT)
        time.sleep(0.01)

if __name__ == "__main__":
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    threading.Thread(target=interrupt, daemon=True).start()
    print([outcome.value for outcome in pool.map(abs, [(-1,)], jobs=1)], bool(asked))
"""


def test_ctrl_c_while_processes_start_is_for_the_parent_alone(tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = [sys.executable, tmp_path / "interrupted.py"]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=False, timeout=120)
    assert (done.stdout, done.stderr) == ("[1] True\n", "")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="cannot be imported by another process"):
        next(pool.map(lambda x: x, [(1,)]))
    with pytest.raises(ValueError, match="jobs=0: at least one"):
        next(pool.map(os.getpid, [()], jobs=0))
    with pytest.raises(ValueError, match=r"no executor 'slurmm'; did you mean 'slurm'\?"):
        next(pool.map(os.getpid, [()], executor="slurmm"))
    with pytest.raises(ValueError, match="the local executor has no options, got num_gpus"):
        next(pool.map(os.getpid, [()], options={"num_gpus": 1}))
