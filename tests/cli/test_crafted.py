"""Run directories that somebody damaged or made up: a clear error or the right answer, never a traceback.

And nothing outside of them is written to or deleted, whatever links they hold.
"""

import ast
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import yaml

from granet import cli
from granet.cli import main
from granet.train import checkpoint
from granet.train.recipe import validate
from granet.train.run import Run, execute

RECIPE = {
    "name": "crafted",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "method": {"name": "granet", "sparsity": 0.5, "end": "50%", "interval": "7it"},
    "train": {"epochs": 2, "batch_size": 64, "threads": 1, "device": "cpu"},
}
COMMANDS = {
    "resume": ["resume", "run"],
    "eval": ["eval", "run"],
    "compare": ["compare", "run", "--out", "page.html"],
    "sensitivity": ["sensitivity", "run", "--sparsities", "0.9"],
    "connectivity": ["connectivity", "run"],
    "plasticity": ["plasticity", "run", "--at", "1", "--prune", "0.5", "--regenerate", "none", "--retrain", "1it"],
    "bench": ["bench", "run"],
}  # fmt: skip
DEEP = "[" * 50_000 + "]" * 50_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run.for_recipe(validate(RECIPE, source="test"), tmp_path_factory.mktemp("runs"))
    execute(run)
    return run.path


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of a finished run, `run` in the folder one stands in, beside a folder that is not its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    return Path(shutil.copytree(finished, "run"))


@pytest.fixture
def unfinished(run):
    """The same, stopped after its first epoch."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "00000040")
    return run


def last(run):
    return max((run / "checkpoints").iterdir())


def text(name, content):
    """Crafts a file of this content."""
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def summary(**changes):
    def craft(run):
        file = run / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return craft


def records(*more):
    def craft(run):
        with (run / "metrics.jsonl").open("a") as file:
            file.write("".join(f"{line}\n" for line in more))

    return craft


def folder(name):
    def craft(run):
        (run / name).unlink()
        (run / name).mkdir()

    return craft


def pipe(name):
    def craft(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return craft


def state(change):
    """Crafts the state of all checkpoints, with the checksums that go with it."""

    def craft(run):
        for path in (run / "checkpoints").iterdir():
            head = json.loads((path / "state.json").read_text())
            change(head)
            head["crc32"]["state.json"] = zlib.crc32(json.dumps([head["step"], head["state"]]).encode())
            (path / "state.json").write_text(json.dumps(head))

    return craft


def tensors(content):
    """Crafts the tensors of all checkpoints, with the checksums that go with them."""

    def craft(run):
        for path in (run / "checkpoints").iterdir():
            (path / "state.safetensors").write_bytes(content)
            state(lambda head: head["crc32"].update({"state.safetensors": zlib.crc32(content)}))(run)

    return craft


def header(text):
    return len(text).to_bytes(8, "little") + text.encode()


def set_in(*path, value):
    def change(head):
        place = head["state"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return state(change)


def momentum_of_another_shape(run):
    for path in checkpoint.paths(run / "checkpoints"):
        found = checkpoint.load(path)
        for buffers in found.state["optimizer"]["state"].values():
            buffers["momentum_buffer"] = buffers["momentum_buffer"][:1]
        found.state["optimizer"]["param_groups"][0]["momentum"] = "much"
        checkpoint.save(path.parent, step=found.step, model=found.model, state=found.state)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
CRAFTED = {
    "recipe of bytes": text("recipe.yaml", b"\x80\x04\xff\x00"),
    "recipe cut short": lambda run: os.truncate(run / "recipe.yaml", 100),
    "recipe is a list": text("recipe.yaml", "[1, 2]"),
    "recipe of wrong types": text("recipe.yaml", yaml.safe_dump(RECIPE | {"train": {"lr": {}}, "seed": []})),
    "recipe with aliases of aliases": text("recipe.yaml", BOMB),
    "recipe too deep": text("recipe.yaml", DEEP),
    "recipe with a huge number": text("recipe.yaml", f"seed: {'9' * 5000}"),
    "recipe is a folder": folder("recipe.yaml"),
    "recipe is a pipe": pipe("recipe.yaml"),
    "summary too deep": text("summary.json", DEEP),
    "summary is a list": text("summary.json", "[]"),
    "summary is a folder": folder("summary.json"),
    "summary is a pipe": pipe("summary.json"),
    "summary with NaN": summary(sparsity=float("nan"), seconds=float("inf")),
    "summary of wrong types": summary(flops=[1, 2], layers={"a": 1}),
    "summary without layers' names": summary(layers=[{"name": None, "shape": 1, "total": 0, "active": 0, "flops": 0}]),
    "summary with a score of text": summary(best={"test_accuracy": "high"}),
    "summary with a huge number": summary(parameters={"total": 10**400, "active": 1}),
    "summary with a zero to divide by": summary(steps=0),
    "record too deep": records(DEEP),
    "record with infinite step": records('{"kind": "eval", "step": Infinity, "epoch": 1, "loss": 1, "accuracy": 1}'),
    "record without its numbers": records('{"kind": "train", "step": 1, "epoch": 1}'),
    "record of lists": records('{"kind": "update", "step": 1, "epoch": 1, "active": [], "grown": 1, "dropped": null}'),
    "records of bytes": text("metrics.jsonl", b"\xff\xfe\n\x00\n"),
    "records are a folder": folder("metrics.jsonl"),
    "environment is a list": text("environment.json", "[]"),
    "checkpoints are a file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")),
    "state too deep": lambda run: [(p / "state.json").write_text(DEEP) for p in (run / "checkpoints").iterdir()],
    "state with nothing in it": state(lambda head: head.update(state={})),
    "state of another step": state(lambda head: head.update(step=10**30)),
    "step that was never taken": set_in("sparsifier", "step", value=-5),
    "masks are numbers": set_in("sparsifier", "masks", value={"fc1.weight": 1}),
    "best is a list": set_in("best", value=[1, 2]),
    "best of a huge step": set_in("best", value={"step": 10**30, "loss": 0, "accuracy": 0}),
    "costs are texts": set_in("seconds", value="long"),
    "random state is a number": set_in("rng", value=3),
    "offset of the records is negative": set_in("metrics", value=-3),
    "window is a text": set_in("window", value="abc"),
    "momentum of another shape": momentum_of_another_shape,
    "tensors with a huge header": tensors((2**60).to_bytes(8, "little") + b"{}"),
    "tensors with a header of nothing": tensors(header("[]")),
    "tensors of a huge shape": tensors(header('{"a": {"dtype": "U8", "shape": [1e99], "data_offsets": [0, 0]}}')),
    "tensors too deep": tensors(header(DEEP)),
}  # fmt: skip


CONCERNED = {  # what reads the file; the others would only do their work
    "summary": ("resume", "compare", "plasticity"),
    "record": ("compare",),
    "records": ("compare",),
    "environment": ("compare",),
    "offset": ("resume",),
    "window": ("resume", "eval", "bench"),
    "costs": ("resume", "eval", "bench"),
    "best": ("resume", "eval"),
    "step": ("resume", "eval", "bench"),
    "state": ("resume", "eval", "connectivity", "sensitivity", "bench"),
    "tensors": ("resume", "eval", "connectivity", "sensitivity", "bench"),
    "random": ("resume", "eval", "sensitivity", "bench"),
    "masks": ("resume", "eval", "connectivity", "sensitivity", "bench"),
    "checkpoints": ("resume", "eval", "connectivity", "sensitivity", "bench"),
    "momentum": ("resume", "eval", "sensitivity"),
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_no_command_breaks_over_a_crafted_run(run, crafted, capsys):
    CRAFTED[crafted](run)
    refused = []
    concerned = CONCERNED.get(crafted.partition(" ")[0], COMMANDS)
    for name in concerned:
        words = COMMANDS[name]
        if name == "resume" and not crafted.startswith("summary"):  # one that is not finished reads its checkpoint
            (run / "summary.json").rename("summary")
        code = main(words)
        _, err = capsys.readouterr()
        if Path("summary").exists():
            (run / "summary.json").unlink(missing_ok=True)
            Path("summary").rename(run / "summary.json")
        assert code in (0, 1, 2)
        if code == 2:
            refused.append(name)
            assert err.startswith("granet: error: ")
            assert "run" in err  # the file, or its folder
            lines = err.splitlines()
            assert len(lines) < 12 and max(map(len, lines)) < 700, err
            assert "Traceback" not in err
    assert refused, "no command noticed"


@pytest.mark.slow  # the plasticity's processes and the bench's measurements take their time
def test_a_sound_run_passes_all_commands(run, capsys):
    for words in COMMANDS.values():
        assert main(words) == 0, capsys.readouterr()


def test_names_are_shown_as_they_are_and_command_nothing(run, capsys):
    evil = "[/red][bold]x\x1b[2J\x1b]0;title\x07\u202e"
    summary(name=evil, layers=[])(run)
    assert main(["compare", "run", "--out", "page.html"]) == 0
    out, _ = capsys.readouterr()
    assert "[/red][bold]x" in "".join(out.split())
    assert not any(character in out for character in "\x1b\x07\u202e")
    assert main(["eval", evil]) == 2
    assert "\x1b" not in capsys.readouterr().err
    page = Path("page.html").read_text()
    assert "[/red][bold]x" in page and "<bold>" not in page


def test_all_that_commands_say_goes_one_way():
    for file in Path(cli.__file__).parent.glob("*.py"):
        if file.name in ("terminal.py", "words.py", "show.py", "__init__.py"):  # YAML and JSON escape by themselves
            continue
        tree = ast.parse(file.read_text())
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "print" not in called and "rich.console.Console" not in imported, file.name
        assert "Console" not in called or "granet.cli.terminal" in imported, file.name


def test_messages_name_the_option_and_not_the_library(capsys):
    assert main(["plan", "digits", "--model.keep-dense", "*"]) == 2
    err = capsys.readouterr().err
    assert "--model.keep-dense" in err and "skip=" not in err
    assert main(["plan", "digits", "--model.keep-dense", "*.0.*"]) in (0, 2)
    assert "skip=" not in "".join(capsys.readouterr())


def test_links_in_a_run_lead_nowhere(unfinished, capsys):
    outside = Path("../outside").resolve()
    before = contents(outside)
    for name in ("metrics.jsonl", ".lock", "checkpoints", "tensorboard", "recipe.yaml"):
        there = unfinished / name
        kept = outside.parent / "kept"
        there.rename(kept)
        there.symlink_to(outside if kept.is_dir() else outside / "precious")
        assert main(["resume", "run"]) == 2, name
        assert f"{name} is a symbolic link" in capsys.readouterr().err
        assert contents(outside) == before, name
        there.unlink()
        kept.rename(there)
    assert main(["resume", "run"]) == 0  # and without links it goes on


def test_files_that_are_written_as_a_whole_take_the_place_of_links(unfinished):
    outside = Path("../outside").resolve()
    before = contents(outside)
    for name in ("environment.json", "engine.txt", "report.html", "error.txt"):
        (unfinished / name).unlink(missing_ok=True)
        (unfinished / name).symlink_to(outside / "precious")
    for name in (f".recipe.yaml.{os.getpid()}", f".summary.json.{os.getpid()}", f".report.html.{os.getpid()}"):
        (unfinished / name).symlink_to(outside / "precious")
    (unfinished / "checkpoints" / f".00000040.{os.getpid()}").symlink_to(outside)
    os.link(outside / "precious", unfinished / "hard")
    (unfinished / "hard").replace(unfinished / "metrics.jsonl")
    main(["resume", "run"])
    assert contents(outside) == before


def test_only_what_granet_wrote_is_deleted(unfinished):
    folder = unfinished / "checkpoints"
    others = [folder / name for name in (".old.bak", "2024", "00000003", "20240101", "latest", ".00000001.77")]
    for other in others:
        other.mkdir()
        (other / "thesis.tex").write_text("precious")
    (folder / "00000005").symlink_to(Path("../outside").resolve())
    (folder / ".00000002.78").mkdir()  # of a killed process
    assert main(["resume", "run"]) == 0
    assert all((other / "thesis.tex").read_text() == "precious" for other in others)
    assert (folder / "00000005").is_symlink() and contents(Path("../outside")) == {"precious": "precious"}
    assert not (folder / ".00000002.78").exists()


@pytest.mark.parametrize("name", ["sensitivity", "plasticity"])
def test_results_beside_a_run_are_not_written_through_a_link(run, name, capsys):
    outside = Path("../outside").resolve()
    (run / name).symlink_to(outside)
    assert main(COMMANDS[name]) == 2
    assert f"{name} is a symbolic link" in capsys.readouterr().err
    assert contents(outside) == {"precious": "precious"}


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}
