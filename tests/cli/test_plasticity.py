"""`granet plasticity`."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest

from granet.cli import main

TINY = ["--train.epochs", "3", "--at", "1", "2", "--retrain", "1", "--pretrained-sparsity", "0.9", "--jobs", "1"]
TINY += ["--prune", "0.5", "--regenerate", "none", "restore", "equal"]


@pytest.mark.slow
def test_the_command_makes_everything_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plasticity", *TINY]) == 0
    out = capsys.readouterr().out
    place = tmp_path / "plasticity" / "plasticity-digits"
    made = sorted((place / "cells").iterdir())
    assert len(made) == 2 * 3
    rows = list(csv.DictReader((place / "plasticity.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert {row["arm"] for row in rows} == {"none", "restore", "equal"}
    for file in ("plasticity.svg", "final-gap.svg"):
        assert (place / file).read_text().startswith("<svg")
    page = (place / "plasticity.html").read_text()
    text = (place / "plasticity.md").read_text()
    for finding in ("Plasticity falls at every drop", "Regeneration helps most"):
        assert finding in page
        assert finding in text
        assert finding in out
    assert "6/6" in out

    # a cell more for every missing one, and none of the others again
    stamps = {path: path.stat().st_mtime_ns for path in made}
    made[3].unlink()
    made[5].write_text("{")  # a damaged one is made again
    assert main(["plasticity", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.count("  rate ") == 2
    assert "trained" in out
    after = {path: path.stat().st_mtime_ns for path in made}
    assert {path for path in made if after[path] != stamps[path]} == {made[3], made[5]}

    # the networks it trained are runs: their own checkpoints can be studied as well
    network = next((place / "runs").iterdir())
    assert (
        main(["plasticity", str(network), "--prune", "0.5", "--regenerate", "none", "--at", "2", "--retrain", "1"]) == 0
    )
    assert (network / "plasticity" / "plasticity.csv").read_text().count("\n") == 2


@pytest.mark.slow
def test_a_grid_that_is_interrupted_keeps_what_it_has(tmp_path):
    command = [sys.executable, "-m", "granet.cli", "plasticity", *TINY]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    cells = tmp_path / "plasticity" / "plasticity-digits" / "cells"
    while not (cells.is_dir() and list(cells.glob("*.json"))):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=250)
    if process.returncode == 0:
        pytest.skip("it was done before it could be interrupted")
    assert process.returncode == 130
    assert "the same command goes on" in out
    assert all(json.loads(path.read_text())["seconds"] > 0 for path in cells.glob("*.json"))
    assert (cells.parent / "plasticity.csv").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "6/6" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--at", "13"], "at 13: the training has 12 epochs (240 steps)"),
        (["--at", "0"], "at 0: the training has 12 epochs"),
        (["--at", "soon"], "'soon' is no moment"),
        (["--retrain", "0"], "less than a step"),
        (["--regenerate", "all"], "there is no arm 'all'"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    assert main(["plasticity", "plasticity-digits", *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
