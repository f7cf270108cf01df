import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import yaml

from granet import __version__
from granet.cli import COMMANDS
from granet.cli.progress import stoppable
from granet.train import checkpoint
from granet.train.recipe import RecipeError, validate
from granet.train.run import Run

GRANET = [sys.executable, "-m", "granet.cli"]
TINY = ["--model.name", "mlp", "--train.epochs", "2", "--train.threads", "1", "--method.interval", "7it"]


def test_train_beside_its_twin_then_everything_else(say, tmp_path, monkeypatch):
    code, out, _ = say("train", "digits", *TINY, "--seed", "3", "--twin")
    assert code == 0
    granet, dense = sorted((tmp_path / "runs").iterdir(), reverse=True)
    assert granet.name.startswith("digits-granet-")
    assert dense.name.startswith("digits-dense-")
    assert "step 40/40" in out
    rows = {line.split()[0]: line for line in out.splitlines() if " % " in line}
    assert "90.00 %" in rows[granet.name]
    assert "0.00 %" in rows[dense.name]
    assert f"report: runs/{granet.name}/report.html" in out
    report = (granet / "report.html").read_text()
    assert granet.name in report
    assert dense.name in report
    recipe = Run.open(granet).recipe
    assert (recipe.seed, recipe.train.epochs, recipe.method.interval) == (3, 2, "7it")
    twin = Run.open(dense).recipe
    assert twin.model_dump(exclude={"name", "method"}) == recipe.model_dump(exclude={"name", "method"})

    # the same command again trains nothing, and shows the table
    written = (granet / "metrics.jsonl").stat().st_mtime_ns
    code, out, _ = say("train", "digits", *TINY, "--seed", "3", "--twin")
    assert code == 0
    assert out.count("is finished already") == 2
    assert "90.00 %" in out
    assert (granet / "metrics.jsonl").stat().st_mtime_ns == written

    summary = Run.open(granet).summary
    code, out, _ = say("eval", granet)
    assert code == 0
    assert f"test accuracy {summary['best']['test_accuracy']:.2%}" in out
    assert f"sparsity 90.00%  (best checkpoint, step {summary['best']['step']})" in out
    out = say("eval", granet, "--checkpoint", "last", "--split", "validation")[1]
    assert f"validation accuracy {summary['last']['validation_accuracy']:.2%}" in out

    monkeypatch.setenv("COLUMNS", "70")
    code, out, _ = say("compare", granet, dense, "--out", "twins.html")
    assert code == 0
    lines = [line for line in out.splitlines() if line.strip().startswith("digits-")]
    assert [len(line.split(" % ")) for line in lines[-2:]] == [4, 4]  # what is no terminal gets whole lines
    assert "report: twins.html" in out
    assert dense.name in (tmp_path / "twins.html").read_text()


def start(*args, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [*GRANET, *map(str, args)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("way", ["SIGINT", pytest.param("SIGHUP", marks=pytest.mark.slow), "reader gone"])
def test_whoever_stops_a_training_gets_a_checkpoint(way, tmp_path):
    """Ctrl-C, a terminal that is closed, and `granet train | head`."""
    changes = ["--model.name", "mlp", "--train.epochs", "400", "--train.checkpoint", "100%", "--train.log", "1it"]
    process = start("train", "digits", *changes, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (path,) = (tmp_path / "runs").iterdir()
    if way == "reader gone":
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=120)
    else:
        process.send_signal(signal.Signals[way])
        out, err = process.communicate(timeout=120)
        assert f"stopped; go on with: granet resume runs/{path.name}" in out
    assert (process.returncode, err) == (130, "")
    step = checkpoint.load_latest(path / "checkpoints").step
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == step < 8000


def test_signals_that_are_ignored_stay_so():
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_help_is_instant_and_has_examples():
    code = "import sys; sys.argv = ['granet', 'train', '--help']\nfrom granet.cli import main\nmain()\n"
    code += "sys.exit('heavy: ' + ' '.join({'torch', 'numpy', 'sklearn', 'altair'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "heavy:"
    assert "granet train cifar10-vgg19 --method rigl" in done.stdout
    assert "--method.regeneration" in done.stdout

    done = subprocess.run([*GRANET, "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(say, command):
    code, out, _ = say(command, "--help")
    assert code == 0
    assert f"granet {command}" in out
    assert "example" in out


def test_help_shows_the_settings_of_the_method_asked_for(say):
    assert "--method.drop-fraction" in say("train", "digits", "--method", "rigl", "--help")[1]
    assert "--method.drop-fraction" not in say("train", "digits", "--help")[1]


def test_settings_that_a_method_needs_and_the_recipe_lacks_are_given_as_options():
    from granet.cli.arguments import parse

    @dataclass(frozen=True)
    class Options:
        """None."""

    def method(*words):
        return parse(["digits", "--method", "mest", *words], Options, prog="granet train", description="").recipe.method

    found = method("--method.halve", "20%", "--method.end=80%", "--method.sparsity", "0.8")
    assert (found.name, found.halve, found.end, found.sparsity) == ("mest", "20%", "80%", 0.8)
    with pytest.raises(RecipeError, match=r"method.halve: is missing; add --method.halve$"):
        method("--method.end", "80%")
    with pytest.raises(RecipeError, match=r"method.end: is missing; add --method.halve, --method.end$"):
        method()
    with pytest.raises(RecipeError, match="'x' is not a number of steps"):
        method("--method.end", "80%", "--method.halve", "x")


@pytest.mark.parametrize("what", ["recipes", "sweeps", "methods", "models", "data"])
def test_ls(say, what):
    expected = {
        "recipes": ["digits", "cifar10-vgg19", "imagenet-resnet50", "granet-d2s"],
        "sweeps": ["digits", "cifar10", "84 runs", "granet sweep NAME"],
        "methods": ["granet", "rigl", "set", "gmp", "static", "dense"],
        "models": ["digits-cnn", "resnet20", "vgg19"],
        "data": ["digits", "cifar10", "Download"],
    }
    code, out, _ = say("ls", what)
    assert code == 0
    assert all(word in out for word in expected[what])


def test_show_gives_yaml_that_trains(say):
    code, out, _ = say(
        "show", "cifar10-vgg19", "--method", "rigl", "--method.sparsity", "0.98", "--train.nesterov", "False"
    )
    assert code == 0
    recipe = validate(yaml.safe_load(out), source="show")
    assert (recipe.name, recipe.method.sparsity, recipe.train.nesterov) == ("cifar10-vgg19-rigl", 0.98, False)
    assert (recipe.method.interval, recipe.method.drop_fraction) == ("1000it", 0.5)


def test_show_gives_the_schema(say):
    code, out, _ = say("show", "--schema")
    assert code == 0
    assert "GraNet" in json.loads(out)["$defs"]


@pytest.mark.parametrize(
    "spelling", [["--method", "set"], ["--method=set"], ["--method.name", "set"], ["--method.name=set"]]
)
def test_a_method_is_chosen_by_name(say, spelling):
    assert "name: digits-set" in say("show", "digits", *spelling)[1]


@pytest.mark.parametrize("spelling", [["--engine", "sparse"], ["--engine=sparse"], ["--train.engine", "sparse"]])
def test_the_engine_is_chosen_by_a_short_name_too(say, spelling):
    code, out, _ = say("show", "digits", *spelling)
    assert code == 0 and yaml.safe_load(out)["train"]["engine"] == "sparse"


def test_plan(say):
    code, out, _ = say(
        "plan", "digits", "--method", "static", "--method.sparsity", "0.75", "--model.keep-dense", "head.*"
    )
    assert code == 0
    assert out.startswith("Static(sparsity=0.75")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "--model.keep-dense 'head.*'" in lines["head.0.weight"]
    assert "conv" in lines["features.3.weight"]


@pytest.mark.parametrize(
    ("words", "budgets"),
    [
        (["snip", "--method.sparsity", "0.9"], ["global", "global"]),
        (["str"], ["100.0%", "found"]),
        (["fixed"], ["found"] * 2),
    ],
)
def test_a_plan_says_what_is_not_known_beforehand(say, words, budgets):
    code, out, _ = say("plan", "digits", "--method", *words)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("features.0.weight"))
    assert [word for word in line.split() if word in ("global", "found", "100.0%")] == budgets


def test_plan_with_a_pattern(say):
    code, out, _ = say("plan", "digits", "--model.pattern", "4x1")
    assert code == 0
    assert "pattern 4x1" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "blocks" in lines["parameter"]
    assert "<shapes that 4x1 does not fit>" in lines["head.2.weight"]


def test_a_pattern_is_for_the_sparse_network_not_for_its_twin(say, tmp_path):
    tiny = ["--train.epochs", "1", "--train.threads", "1", "--method.interval", "5it", "--model.pattern", "2:4"]
    code, out, _ = say("train", "digits", *tiny, "--twin")
    assert code == 0
    assert "90.00 %, 2:4" in out
    patterns = {Run.open(run).recipe.method.name: Run.open(run).recipe.model.pattern for run in tmp_path.glob("runs/*")}
    assert patterns == {"granet": "2:4", "dense": "unstructured"}


def test_plan_needs_no_data(say, monkeypatch, tmp_path):
    monkeypatch.setenv("GRANET_DATA", str(tmp_path))
    code, out, _ = say("plan", "cifar100-resnet20")
    assert code == 0
    assert out.startswith("cifar100 is not on this machine")
    assert "head.weight" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["train", "digit"], "there is no recipe 'digit'; did you mean 'digits'?"),
        (["train", "digits", "--method", "grnet"], "no method 'grnet'; did you mean 'granet'?"),
        (["train", "digits", "--method"], "--method needs a name"),
        (["train", "--method.sparsty", "0.9"], "--method.sparsity"),
        (["train", "--train.epochs", "many"], "many"),
        (["train", "--train.lr", "-1"], "greater than 0"),
        (["train", "--model.pattern", "2;4"], "did you mean '2:4'"),
        (["train", "--model.pattern", "2:4", "--method.sparsity", "0.4", "--method.initial-sparsity", "0.1"], "0.5 or"),
        (["train", "--method.interval", "5 epochs"], "not a number of steps"),
        (["train", "--train.optimizer", "adamw"], "nesterov belongs to sgd"),
        (["train", "--method.sparsity", "1.5"], "sparsity=1.5 is outside [0, 1)"),
        (["train", "--method.end", "200%"], "end"),
        (["train", "cifar10-vgg19"], "cifar-10-python.tar.gz"),
        (["train", "missing.yaml"], "there is no recipe file missing.yaml"),
        (["resume", "runs/none"], "runs/none is not a run directory"),
        (["eval", "runs/none"], "runs/none is not a run directory"),
        (["compare", "runs/none"], "runs/none"),
        (["compare"], "no runs were given"),
        (["ls", "reciepes"], "reciepes"),
    ],
)
def test_errors_are_one_clear_line(say, monkeypatch, tmp_path, args, says):
    monkeypatch.setenv("GRANET_DATA", str(tmp_path))
    code, _, err = say(*args)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_traceback_can_be_asked_for(say, monkeypatch):
    monkeypatch.setenv("GRANET_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no recipe"):
        say("train", "nothing")


def test_version(say):
    assert say("--version") == (0, f"granet {__version__}\n", "")


def test_the_package_itself_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "granet", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == __version__
