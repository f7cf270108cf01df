import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from granet.cli.sweep import last_epoch
from granet.train.run import Run

GRANET = [sys.executable, "-m", "granet.cli"]
TINY = """
recipe = "digits"
seeds = [0, 1]
methods = [
    "dense",
    {name = "static", label = "static | uniform", method.distribution = "uniform"},
    {name = "granet", label = "GraNet, longer", train.epochs = 2, method.interval = "5it"},
]
[grid]
method.sparsity = [0.8, 0.9]
model.name = "mlp"
train = {epochs = 1, warmup = 0}
[report]
compare = [["static | uniform", "dense"]]
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A whole sweep by the command line: its folder and what it said."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "tiny.toml").write_text(TINY)
    command = [*GRANET, "sweep", "tiny.toml", "--jobs", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_table_names_what_differs(swept):
    _, out = swept
    assert re.search(r"^10/10 ", out, flags=re.M)
    lines = [line for line in out.splitlines() if re.match(r"(dense|static|GraNet)", line)]
    assert [line.split("  ")[0] for line in lines[:5]] == ["dense", *2 * ["static | uniform", "GraNet, longer"]]
    assert [line.rstrip().endswith("2  [1]") for line in lines[:5]] == [False, False, True, False, True]
    assert "[1] train.epochs 2 instead of 1" in out
    assert [re.search(r"(\d+)%", line)[1] for line in lines[1:5]] == ["80", "80", "90", "90"]
    assert re.search(r"digits, 80%: static \| uniform - dense = [+-]\d+\.\d\d ± \d+\.\d\d: ", out)


def test_all_runs_are_in_the_csv_and_the_table_in_markdown(swept):
    folder, _ = swept
    with (folder / "sweeps/tiny/runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        summary = Run.open(folder / "runs" / row["run"]).summary
        assert float(row["last_test"]) == summary["last"]["test_accuracy"]
        assert float(row["exploration"]) == summary["exploration"]
        assert int(row["seed"]) == summary["seed"]
        longer = row["method"] == "GraNet, longer"
        assert (row["differs"], int(row["steps"])) == (("train.epochs 2 instead of 1", 40) if longer else ("", 20))
        # relative to what all others had
        ratio = summary["flops"]["training"] / summary["flops"]["training_dense"] * (2 if longer else 1)
        assert float(row["training_ratio"]) == pytest.approx(ratio)
    page = (folder / "sweeps/tiny/table.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 7
    assert len({len(line) for line in table}) == 1
    assert "static \\| uniform" in page
    assert "- [1] train.epochs 2 instead of 1" in page


def test_the_report_has_a_plot_of_each_kind(swept):
    folder, _ = swept
    page = (folder / "sweeps/tiny/report.html").read_text()
    assert page.count("<figure") == 2
    assert "against training FLOPs as a share of dense" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_same_command_again_trains_nothing(swept, say, monkeypatch):
    folder, _ = swept
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    code, out, _ = say("sweep", "tiny.toml", "--dry-run")
    assert (code, out.count("finished  digits, ")) == (0, 10)
    assert say("sweep", "tiny.toml")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_ctrl_c_saves_everything_and_says_how_to_go_on(tmp_path):
    changed = TINY.replace("epochs = 1", 'epochs = 300, log = "1it"').replace("train.epochs = 2, ", "")
    (tmp_path / "tiny.toml").write_text(changed)
    command = [*GRANET, "sweep", "tiny.toml", "--jobs", "2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a group of its own, all of which Ctrl-C reaches, as from a terminal
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **streams)
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "stopped with 10 of 10 runs to go; the same command continues" in out
    assert "Traceback" not in err
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert list((run / "checkpoints").glob("[0-9]*"))
        assert not (run / "error.txt").exists()


@pytest.mark.slow
def test_a_failed_run_gives_exit_code_1_and_its_last_lines(swept, say, monkeypatch):
    folder, _ = swept
    monkeypatch.chdir(folder)
    (folder / "two.toml").write_text(TINY.replace("seeds = [0, 1]", "seeds = [0, 7]").replace("[0.8, 0.9]", "0.8"))
    broken = next(
        line.split()[-1]
        for line in say("sweep", "two.toml", "--dry-run")[1].splitlines()
        if line.startswith("to train")
    )
    (folder / broken / "checkpoints").parent.mkdir()
    (folder / broken / "checkpoints").write_text("in the way")
    code, out, _ = say("sweep", "two.toml", "--jobs", "1")
    assert code == 1
    assert "1 of 6 runs failed" in out
    assert f"{broken}/error.txt" in out
    assert (folder / broken / "error.txt").read_text().splitlines()[-1] in out
    assert "[1] 1 of 2 runs are finished" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit"], "there is no sweep 'digit'; did you mean 'digits'?"),
        (["none.toml"], "there is no file none.toml; sweeps of the package: chtss, cifar10, digits"),
        (["digits", "--jobs", "0"], "jobs=0: at least one must run"),
        (["digits", "--option", "num_gpus", "1"], "the local executor has no options, got num_gpus"),
    ],
)
def test_what_is_wrong_is_said(say, words, message):
    code, _, err = say("sweep", *words)
    assert code == 2
    assert message in err


def test_help_waits_for_nothing_heavy():
    code = "import sys; sys.argv = ['granet', 'sweep', '--help']\nfrom granet.cli import main\nmain()\n"
    code += "sys.exit('heavy: ' + ' '.join({'torch', 'numpy', 'sklearn', 'altair', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "heavy:"


def test_progress_is_read_from_the_last_whole_record(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert last_epoch(log) is None
    log.write_text('{"epoch": 0.5}\n{"epoch": 1.5}\n{"epo')
    assert last_epoch(log) == 1.5
    log.write_text('{"epoch": 0.5}\n{"epoch": 2.5, "x": "' + 20_000 * "y" + '"}\n')
    assert last_epoch(log) is None  # longer than what is read: seen again at the next record
