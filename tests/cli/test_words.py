"""What the command line says to words that it cannot use."""

import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from granet.cli import COMMANDS
from granet.train.run import Run

ROOT = Path(__file__).parents[2]
GRANET = [sys.executable, "-m", "granet.cli"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("train --method.sparsty 0.9", "granet train has no option --method.sparsty; did you mean --method.sparsity?"),
        ("train --epochs 3", "granet train has no option --epochs; did you mean --train.epochs?"),
        ("train --lr=3", "granet train has no option --lr; did you mean --train.lr?"),
        ("train --qqq 3", "granet train has no option --qqq; `granet train --help` lists all"),
        ("eval runs/x --chekpoint last", "granet eval has no option --chekpoint; did you mean --checkpoint?"),
        ("eval --chekpoint last", "granet eval has no option --chekpoint; did you mean --checkpoint?"),
        ("sweep digits --job 4", "granet sweep has no option --job; did you mean --jobs?"),
        ("bench digits-cnn --sizes 8", "granet bench has no option --sizes; did you mean --size?"),
        ("lottery --lottery.level 3", "granet lottery has no option --lottery.level; did you mean --lottery.levels?"),
        ("plasticity --prun 0.5", "granet plasticity has no option --prun; did you mean --prune?"),
        ("resume --qqq", "granet resume has no option --qqq; `granet resume --help` lists all"),
        ("train digits extra", "granet train cannot use 'extra'; `granet train --help` tells what it takes"),
        ("train --seed", "--seed needs a value"),
        ("train --seed x", "--seed: 'x' is no whole number"),
        ("train --train.lr x", "--train.lr: 'x' is no number"),
        ("train --train.bf16 maybe", "--train.bf16: 'maybe' is not possible; (choices: true, false)"),
        ("train --train.ema x", "--train.ema: 'x' is not possible; write null or a number"),
        ("train --train.lr -1", "the recipe digits is not valid: train.lr: "),
        ("eval", "granet eval needs PATH (run directory); `granet eval --help` tells more"),
        ("eval runs/x --split tset", "--split: 'tset' is not possible; did you mean 'test'?"),
        ("sweep --option a", "--option needs pairs of a name and a value"),
        ("show --method.sparsity 7", "the recipe digits is not valid: method: GraNet: sparsity=7.0 is outside [0, 1)"),
        ("show --method.end 300%", "the recipe digits is not valid: method.end: '300%' is too much"),
        ("lottery --method rigl", "granet lottery trains the method 'dense' and cannot train 'rigl'"),
        ("lottery digits-rigl", "granet lottery trains the method 'dense' and cannot train 'rigl'"),
        ("lottery --method.sparsity 0.9", "has no option --method.sparsity; did you mean --lottery.sparsity?"),
        ("plasticity --method rigl", "granet plasticity trains the method 'dense' and cannot train 'rigl'"),
    ],
)
def test_a_wrong_word_costs_one_line_that_says_what_to_write(say, line, says):
    code, out, err = say(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("granet: error: ") and says in err
    assert err.count("\n") == 1
    assert "pydantic" not in err


@pytest.mark.parametrize("word", ["true", "True", "false", "False", "null", "None"])
def test_true_false_and_null_are_written_as_in_yaml_or_as_in_python(say, word):
    key = "ema" if word.lower() in ("null", "none") else "bf16"
    code, out, _ = say("show", f"--train.{key}", word)
    assert code == 0
    assert yaml.safe_load(out)["train"][key] is {"true": True, "false": False, "null": None, "none": None}[word.lower()]


def test_help_shows_true_false_and_null_as_a_recipe_does(say):
    shown = say("train", "--help")[1]
    assert "{true,false}" in shown and "{null}|" in shown
    assert "{True" not in shown and "{None}" not in shown


def test_the_folder_of_runs_and_a_missing_run_are_told_from_a_model(say, tmp_path):
    run = Path("runs/digits-granet-000000")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    for source in ("runs", "runs/none"):
        code, _, err = say("bench", source)
        assert code == 2
        assert f"{source} is not a run directory" in err and "runs in runs: digits-granet-000000" in err
    assert "unknown model 'resnet5'" in say("bench", "resnet5")[2]


def in_a_terminal(*args, **environment):
    """What a command writes to a terminal of 80 columns, in bytes."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"} | environment
    process = subprocess.Popen([*GRANET, *args], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += (part := os.read(ours, 65536))
        except OSError:  # the other side is closed
            part = b""
        if not part:
            break
    process.wait()
    os.close(ours)
    return said


def test_no_color_is_respected_by_help():
    assert b"\x1b[" in in_a_terminal("eval", "--help", NO_COLOR="")
    plain = in_a_terminal("eval", "--help", NO_COLOR="1")
    assert b"--checkpoint" in plain and b"\x1b[" not in plain


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for file in [*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]:
        named |= set(re.findall(r"granet\[(\w+)\]", file.read_text()))
    assert {"train", "ray", "slurm"} <= named <= set(extras)


@pytest.mark.parametrize(("executor", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_library_that_is_not_there_is_missed_before_anything_runs(say, monkeypatch, tmp_path, executor, library):
    monkeypatch.setitem(sys.modules, library, None)  # cannot be imported
    for words in (["sweep", "digits", "--dry-run"], ["sweep", "digits"], ["plasticity"]):
        code, out, err = say(*words, "--executor", executor)
        assert (code, out) == (2, "")
        assert f'the executor {executor} needs {library}: pip install "granet[{executor}]"' in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "train",
        "lottery",
        "sweep digits",
        "plasticity",
        "resume here",
        "sensitivity here",
        "connectivity here",
        "compare here",
    ],
)
def test_what_draws_is_missed_before_anything_is_trained(say, monkeypatch, tmp_path, words):
    from granet.train import recipes

    (tmp_path / "here").mkdir()
    (tmp_path / "here/recipe.yaml").write_text(recipes.load("digits").to_yaml())
    (tmp_path / "here/metrics.jsonl").touch()
    monkeypatch.setitem(sys.modules, "altair", None)
    code, out, err = say(*words.split())
    assert (code, out) == (2, "")
    assert 'a report needs altair: pip install "granet[train]"' in err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert len(list((tmp_path / "here").iterdir())) == 2


def test_all_commands_read_their_words_in_one_place():
    for command in COMMANDS:
        assert "tyro.cli(" not in (ROOT / f"src/granet/cli/{command}.py").read_text()


def test_the_line_of_a_lottery_names_the_run_that_is_written(say, tmp_path):
    code, out, _ = say("lottery", "--train.epochs", "1", "--train.warmup", "0", "--lottery.levels", "1")
    assert code == 0
    written = sorted((path.name for path in Path("runs").iterdir()), key=len)
    assert [line.split()[0] for line in out.splitlines() if "  step " in line] == written
    assert [Run.open(Path("runs") / name).path.name for name in written] == written
