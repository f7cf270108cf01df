import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import granet
from granet.train import checkpoint, recipes
from granet.train.recipe import RecipeError, validate
from granet.train.run import Metrics, Run, environment, execute, load_weights
from granet.train.trainer import Trainer, TrainingError

METHOD = {"name": "granet", "sparsity": 0.9, "end": "60%", "interval": "7it"}


def recipe(model="mlp", method=METHOD, seed=0, name="custom", **train):
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu", "log": "5it"} | train
    values = {"name": name, "data": {"name": "digits"}, "model": {"name": model}, "method": method, "seed": seed}
    return validate(values | {"train": settings}, source="test")


def records(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        timed = {"seconds", "metrics"}  # the record's length in bytes depends on the digits of its timings
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a.keys() - timed)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# One process loads torch once, and forks the attempts: each dies by SIGKILL, at a step given or whenever it hits.
ATTEMPTS = """
import os, random, signal, sys, time
from pathlib import Path
import sklearn.datasets, torch.utils.tensorboard
from granet.train.run import Run, execute
from granet.train.recipe import validate
import yaml

file, runs, deaths = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
recipe = validate(yaml.safe_load(file.read_text()), source=str(file))
attempts = 0
while True:
    death = deaths.pop(0) if deaths else None
    attempts += 1
    child = os.fork()
    if child == 0:
        steps = 0
        def stop():
            global steps
            steps += 1
            if death is not None and death.startswith("step") and steps == int(death[4:]):
                os.kill(os.getpid(), signal.SIGKILL)
            return False
        execute(Run.for_recipe(recipe, runs), stop=stop)
        os._exit(0)
    if death is not None and death.startswith("time"):
        time.sleep(float(death[4:]))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(attempts)
        sys.exit(os.WEXITSTATUS(status))
"""

SGD = {"momentum": 0.9, "nesterov": True, "schedule": "cosine", "lr": 0.05}
ADAMW = {"optimizer": "adamw", "lr": 0.002, "ema": 0.9, "clip_norm": 1.0, "accumulate": 2, "channels_last": True}
ADAMW |= {"partial_batch": True}


@pytest.mark.slow
@pytest.mark.parametrize("train", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_run_killed_again_and_again_is_the_same_to_the_bit(tmp_path, train):
    settings = recipe("digits-cnn", batch_size=32, checkpoint="6it", evaluate="16it", **train)
    whole = Run.for_recipe(settings, tmp_path / "whole")
    execute(whole)

    rng = random.Random(os.environ.get("PYTEST_SEED", "granet"))
    deaths = [f"step{rng.randint(1, 15)}" for _ in range(3)] + [f"time{rng.uniform(0.1, 1):.2f}" for _ in range(2)]
    file = tmp_path / "recipe.yaml"
    file.write_text(settings.to_yaml())
    command = [sys.executable, "-c", ATTEMPTS, str(file), str(tmp_path / "killed"), *deaths]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3, "the run was over before it was killed"

    killed = Run.for_recipe(settings, tmp_path / "killed")
    assert killed.path.name == whole.path.name
    assert records(killed) == records(whole)
    one, other = (checkpoint.load_latest(run.checkpoints) for run in (whole, killed))
    assert one.step == other.step == (41 if settings.train.partial_batch else 40)
    assert equal(one.model, other.model)
    assert equal(one.state, other.state)
    assert one.state["sparsifier"]["masks"]
    assert equal(whole.summary, killed.summary)


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_the_same_to_the_bit(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    execute(run)
    whole = checkpoint.load_latest(run.checkpoints)
    (run.path / "summary.json").unlink()
    execute(run)
    again = checkpoint.load_latest(run.checkpoints)
    assert equal(whole.model, again.model) and equal(whole.state, again.state)


def test_a_run_directory_holds_what_went_in_and_came_out(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    summary = execute(run)
    assert Run.open(run.path).recipe == run.recipe
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["train"]["weight_decay"] == 5e-4
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert run.summary == json.loads(json.dumps(summary))
    assert summary["name"] == run.path.name
    assert summary["last"]["step"] == summary["steps"] == 20
    evals = [record for record in records(run) if record["kind"] == "eval"]
    assert summary["last"]["validation_accuracy"] == evals[-1]["accuracy"]
    assert 0.5 < summary["best"]["test_accuracy"] <= 1
    per_class = summary["best"]["test_accuracy_per_class"]
    assert len(per_class) == 10 and min(per_class) <= summary["best"]["test_accuracy"] <= max(per_class)
    assert not list(run.path.glob(".*.[0-9]*"))


def test_the_best_network_is_the_one_of_its_checkpoint(tmp_path):
    # at a rate this high it learns at first, and falls apart
    run = Run.for_recipe(
        recipe(method={"name": "static", "sparsity": 0.8}, lr=1.0, schedule="constant", evaluate=1, checkpoint="100%"),
        tmp_path,
    )
    summary = execute(run)
    best, last = summary["best"], summary["last"]
    assert best["step"] < last["step"]
    assert best["validation_accuracy"] > last["validation_accuracy"]
    assert {best["step"], 20} <= {int(path.name) for path in checkpoint.paths(run.checkpoints)}
    trainer = Trainer(run.recipe)
    for which, expected in (("best", best), ("last", last)):
        assert load_weights(run, trainer, which) == expected["step"]
        assert trainer.evaluate("test").accuracy == expected["test_accuracy"]
        assert trainer.evaluate("validation").accuracy == expected["validation_accuracy"]


def test_events_are_those_of_the_records(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.for_recipe(recipe(), tmp_path)
    execute(run)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    losses = [(r["step"], r["loss"]) for r in records(run) if r["kind"] == "train"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(s, pytest.approx(v)) for s, v in losses]
    assert [e.step for e in events.Scalars("active/2.weight")] == [7, 12, 14]


def test_directories_are_named_by_what_is_not_default(tmp_path):
    names = [
        Run.for_recipe(r, tmp_path).path.name for r in (recipe(), recipe(lr=0.06), recipe(seed=1), recipe(epochs=1))
    ]
    assert len(set(names)) == 3
    assert names[0] == names[3]
    assert names[0].startswith("custom-")
    assert Run.for_recipe(recipes.load("digits-rigl"), tmp_path).path.name.startswith("digits-rigl-")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_trained_again(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    first = execute(run)
    seen = []
    assert execute(run, watch=lambda trainer, record: seen.append(record)) == json.loads(json.dumps(first))
    assert not seen


def test_a_stopped_run_goes_on(tmp_path):
    run, whole = Run.for_recipe(recipe(), tmp_path / "a"), Run.for_recipe(recipe(), tmp_path / "b")
    execute(whole)
    calls = []
    assert execute(run, stop=lambda: calls.append(1) or len(calls) == 13) is None
    assert run.summary is None
    assert [int(path.name) for path in checkpoint.paths(run.checkpoints)] == [13]
    assert equal(execute(run), execute(whole))
    assert records(run) == records(whole)


def test_a_run_with_small_checkpoints_is_the_same_to_the_bit(tmp_path):
    whole = Run.for_recipe(recipe(), tmp_path)
    small = Run.for_recipe(recipe(compress=True), tmp_path)
    assert small.path.name != whole.path.name
    execute(whole)
    calls = []
    assert execute(small, stop=lambda: calls.append(1) or len(calls) == 13) is None
    execute(small)
    one, other = (checkpoint.load_latest(run.checkpoints) for run in (whole, small))
    assert equal(one.model, other.model) and equal(one.state, other.state)
    assert records(small) == records(whole)
    sizes = [sum(file.stat().st_size for file in found.path.iterdir()) for found in (one, other)]
    assert sizes[1] < 0.3 * sizes[0]
    trainer = Trainer(whole.recipe)
    granet.load(other.path / "model.safetensors", into=trainer.model)
    assert equal(dict(trainer.model.state_dict()), one.model)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, caplog):
    run, whole = (Run.for_recipe(recipe(checkpoint="5it"), tmp_path / name) for name in "ab")
    execute(whole)
    calls = []
    execute(run, stop=lambda: calls.append(1) or len(calls) == 12)
    file = run.checkpoints / "00000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        execute(run)
    assert "00000012/model.safetensors is truncated" in caplog.text
    assert records(run) == records(whole)
    assert equal(run.summary, whole.summary)


def test_a_run_without_an_intact_checkpoint_is_refused(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    execute(run, stop=lambda: True)
    (run.checkpoints / "00000001" / "state.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint is intact"):
        execute(run)


FULL = """
import resource, sys
from pathlib import Path
import sklearn.datasets, torch.utils.tensorboard, yaml
from granet.train.checkpoint import CheckpointError
from granet.train.recipe import validate
from granet.train.run import Run, execute
recipe = validate(yaml.safe_load(Path(sys.argv[1]).read_text()), source="test")
def watch(trainer, record):
    if record["step"] == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
try:
    execute(Run.for_recipe(recipe, Path(sys.argv[2])), watch=watch)
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""


def test_a_disk_that_fills_up_costs_the_steps_since_the_last_checkpoint(tmp_path):
    settings = recipe(checkpoint="4it")
    (tmp_path / "recipe.yaml").write_text(settings.to_yaml())
    command = [sys.executable, "-c", FULL, str(tmp_path / "recipe.yaml"), str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "00000012" in done.stdout
    assert "The checkpoint before it, 00000008, is untouched" in done.stdout
    full, whole = Run.for_recipe(settings, tmp_path / "full"), Run.for_recipe(settings, tmp_path / "whole")
    assert checkpoint.load_latest(full.checkpoints).step == 8
    assert equal(execute(full), execute(whole))
    assert records(full) == records(whole)


def test_diverged_training_keeps_its_last_checkpoint(tmp_path):
    run = Run.for_recipe(recipe(lr=1e12, schedule="constant", checkpoint=1), tmp_path)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step"):
        execute(run)
    model = checkpoint.load_latest(run.checkpoints).model
    assert model
    assert run.summary is None


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    execute(run, stop=lambda: True)
    with run.locked(), pytest.raises(RecipeError, match="being trained by another process"):
        execute(run)


def test_what_cannot_be_built_leaves_no_directory(tmp_path):
    run = Run.for_recipe(recipe(method={"name": "static", "sparsity": 1.5}), tmp_path)
    with pytest.raises(ValueError, match=r"sparsity=1\.5"):
        execute(run)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_another_recipe_is_refused(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    run.path.mkdir()
    (run.path / "recipe.yaml").write_text(recipe(seed=5).to_yaml())
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        Run.for_recipe(recipe(), tmp_path)


def test_a_damaged_summary_is_named(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    run.path.mkdir(parents=True)
    (run.path / "summary.json").write_text("")
    with pytest.raises(RecipeError, match=r"summary\.json is damaged: .*remove the file"):
        _ = run.summary


def test_the_directory_one_stands_in_has_a_name(tmp_path, monkeypatch):
    run = Run.for_recipe(recipe(), tmp_path)
    run.path.mkdir(parents=True)
    (run.path / "recipe.yaml").write_text(run.recipe.to_yaml())
    monkeypatch.chdir(run.path)
    assert Run.open(Path()).path.name == run.path.name


def test_what_is_no_run_directory(tmp_path):
    execute(Run.for_recipe(recipe(), tmp_path), stop=lambda: True)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a run directory.*runs in .*: custom-"):
        Run.open(tmp_path / "nowhere")
    (tmp_path / "recipe.yaml").write_text("data: [")
    with pytest.raises(RecipeError, match="is damaged"):
        Run.open(tmp_path)


def test_a_run_without_checkpoints_or_best_has_nothing_to_evaluate(tmp_path):
    run = Run.for_recipe(recipe(), tmp_path)
    trainer = Trainer(run.recipe)
    with pytest.raises(checkpoint.CheckpointError, match="has no checkpoint yet"):
        load_weights(run, trainer, "last")
    execute(run, stop=lambda: True)
    with pytest.raises(checkpoint.CheckpointError, match="not been evaluated at its target sparsity"):
        load_weights(run, trainer, "best")
    assert load_weights(run, trainer, "last") == 1


def test_metrics_are_cut_back_to_an_offset(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, 0)
    metrics.write({"step": 1})
    offset = metrics.sync()
    metrics.write({"step": 2})
    metrics.close()
    with file.open("a") as torn:
        torn.write('{"step": 3, "lo')
    again = Metrics(file, offset)
    again.write({"step": 4})
    again.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 4]
    Metrics(file, 10_000).close()
    assert "is shorter than at the checkpoint" in caplog.text


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a write beyond it fails like one on a full disk
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: File too large"):
            metrics.write({"kind": "train"})
            metrics.write({"kind": "train"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.close()


def test_weights_of_a_checkpoint_load_into_the_plain_model(tmp_path):
    from granet.train import models

    run = Run.for_recipe(recipe("digits-cnn"), tmp_path)
    execute(run)
    model = models.build("digits-cnn", classes=10, in_channels=1)
    model.load_state_dict(load_file(checkpoint.paths(run.checkpoints)[0] / "model.safetensors"))
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert zeros >= 0.9 * 72_608 - 1


@pytest.mark.parametrize("ema", [None, 0.8])
@pytest.mark.parametrize(
    "method",
    [
        {"name": "str", "s_init": -4.0},
        {"name": "top-kast", "sparsity": 0.9},
        {"name": "feather", "sparsity": 0.9, "end": "50%"},
    ],
    ids=lambda method: method["name"],
)
def test_a_reparameterized_run_goes_on_to_the_bit_and_leaves_a_plain_network(tmp_path, method, ema):
    from granet.lab import sources
    from granet.train import models

    settings = recipe("digits-cnn", method, batch_size=128, epochs=2, log=3, ema=ema, lr=0.02)
    whole, broken = (Run.for_recipe(settings, tmp_path / name) for name in ("whole", "broken"))
    execute(whole)
    stops = iter([False] * 6 + [True])
    assert execute(broken, stop=lambda: next(stops)) is None
    summary = execute(broken)
    assert records(broken) == records(whole)
    ends = [checkpoint.load_latest(run.checkpoints) for run in (whole, broken)]
    assert equal(ends[0].model, ends[1].model) and equal(ends[0].state, ends[1].state)

    trainer = Trainer(settings)
    load_weights(broken, trainer, "last")
    plain = models.build("digits-cnn", classes=10, in_channels=1)
    plain.load_state_dict(load_file(checkpoint.paths(broken.checkpoints)[0] / "model.safetensors"))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(plain.eval()(x), trainer.model.eval()(x))
    zeros = sum(int((p == 0).sum()) for name, p in plain.named_parameters() if name in trainer.sparsifier.masks)
    assert 0 < zeros == trainer.sparsifier.total - trainer.sparsifier.active
    assert trainer.evaluate("test").accuracy == summary["last"]["test_accuracy"]
    benched = sources.read(str(broken.path)).model
    assert set(benched.state_dict()) == set(plain.state_dict())
    assert summary["parameters"]["total"] == sum(p.numel() for p in plain.parameters())


def test_signals_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    execute(Run.for_recipe(recipe(), tmp_path), stop=lambda: True)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_version_is_that_of_the_package():
    assert environment(Trainer(recipe()))["granet"] == granet.__version__
