"""Training by several processes: real ones, by gloo, as torchrun starts them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import together
from granet.ranks import Ranks, current, joined, leave
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute
from granet.train.trainer import Trainer


def recipe(model="mlp", **train):
    """Handwritten digits, with updates of the topology every five steps."""
    values = recipes.load("digits").model_dump()
    settings = {"epochs": 2, "lr": 0.02, "schedule": "constant", "warmup": 0, "batch_size": 64, "log": 1} | train
    values |= {"name": model, "model": {"name": model}, "train": values["train"] | settings}
    values["method"] = values["method"] | {"interval": 5, "end": 30}
    return validate(values, source="test")


def begin(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(str(folder / "store"), world))


def records(folder, kind):
    (file,) = folder.glob("*/metrics.jsonl")
    return [r for r in map(json.loads, file.read_text().splitlines()) if r["kind"] == kind]


def last_checkpoint(folder, name=""):
    path = max(folder.glob(f"{name}*/checkpoints/*"))
    return load_file(path / "model.safetensors"), load_file(path / "state.safetensors")


def train_together(rank, world, folder):
    begin(rank, world, folder)
    parts = recipe(accumulate=2, clip_norm=1.0, ema=0.9, partial_batch=True)
    assert (
        execute(Run.for_recipe(parts, folder / "mlp"))["last"] == execute(Run.for_recipe(parts, folder / "mlp"))["last"]
    )

    norms = recipe("digits-cnn")
    first = Trainer(norms)
    first.train_until(1)
    if rank == 0:
        torch.save(first.model.state_dict(), folder / "first_step.pt")
    execute(Run.for_recipe(norms, folder / "whole"))
    asked = iter(range(1000))
    assert execute(Run.for_recipe(norms, folder / "resumed"), stop=lambda: rank == 1 and next(asked) == 16) is None
    assert execute(Run.for_recipe(norms, folder / "resumed")) is not None
    leave()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    together.start(train_together, 2, folder)
    return folder


def test_two_ranks_train_as_one_process_does_on_the_same_batches(trained, tmp_path):
    summary = execute(Run.for_recipe(recipe(accumulate=2, clip_norm=1.0, ema=0.9, partial_batch=True), tmp_path))
    (mine, my_state), (theirs, their_state) = last_checkpoint(tmp_path), last_checkpoint(trained / "mlp")
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)
    masks = [name for name in my_state if name.startswith("sparsifier/masks")]
    assert len(masks) == 3 and all(torch.equal(my_state[name], their_state[name]) for name in masks)
    for kind, numbers in (("train", ("step", "loss", "accuracy")), ("eval", ("step", "loss", "accuracy"))):
        alone, together = records(tmp_path, kind), records(trained / "mlp", kind)
        assert len(alone) == len(together) > 1
        for a, b in zip(alone, together, strict=True):
            assert [b[key] for key in numbers] == pytest.approx([a[key] for key in numbers], rel=1e-3)
    (file,) = (trained / "mlp").glob("*/summary.json")
    assert json.loads(file.read_text())["flops"] == summary["flops"]


def test_batch_norms_record_what_all_ranks_have_seen(trained):
    theirs = torch.load(trained / "first_step.pt", weights_only=True)
    alone = Trainer(recipe("digits-cnn"))
    alone.train_until(1)
    means = [name for name in theirs if name.endswith("running_mean")]
    mine = alone.model.state_dict()
    torch.testing.assert_close(theirs[means[0]], mine[means[0]])  # the first one sees the same inputs
    assert (mine[means[0]] != 0).any()


def test_two_ranks_resume_to_the_bit(trained):
    stopped = [r["step"] for r in records(trained / "resumed", "train")]
    assert stopped == list(range(1, len(stopped) + 1))  # written once
    (whole, state), (resumed, other) = (last_checkpoint(trained / name) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(torch.equal(state[name], other[name]) for name in state)


ELASTIC = """
import os, signal, sys
from pathlib import Path
from granet import ranks
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute

folder, values = Path(sys.argv[1]), recipes.load("digits").model_dump()
values["train"] |= {"epochs": 3, "warmup": 0, "checkpoint": 10, "log": 1}
values["method"] |= {"interval": 5, "end": 50}
run = {name: Run.for_recipe(validate(values | {"name": name}, source="test"), folder) for name in ("whole", "killed")}
with ranks.joined() as here:
    execute(run["whole"])
    steps = iter(range(1000))

    def stop():
        if here.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and next(steps) == 35:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    execute(run["killed"], stop=stop)
    (folder / f"rank{here.rank}-life{os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
"""


def torchrun(*args, folder):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.mark.slow
def test_torchrun_starts_again_where_a_killed_process_left_off(tmp_path):
    """Each rank ends only after the sparsifier has found the same masks on all of them."""
    (tmp_path / "elastic.py").write_text(ELASTIC)
    done = torchrun("--max-restarts=1", "elastic.py", "runs", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "runs").glob("rank*")} == {"rank0-life1", "rank1-life1"}
    (whole, state), (killed, other) = (last_checkpoint(tmp_path / "runs", name) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.slow
def test_the_command_line_trains_under_torchrun(tmp_path):
    settings = ["digits", "--train.epochs", "1", "--train.warmup", "0", "--method.interval", "5it"]
    done = torchrun("-m", "granet.cli", "train", *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1  # one of them talks
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "report.html").exists()
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2


def test_an_error_ends_all_ranks_with_its_message(tmp_path):
    done = torchrun("-m", "granet.cli", "train", "digits", "--train.batch_size", "63", folder=tmp_path)
    assert done.returncode != 0
    assert "granet: error on rank 1: train.batch_size is that of all processes together, and 63" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_shares_of_a_batch():
    assert Ranks().share(7) == 7
    assert Ranks(rank=1, world=4).share(128, 2) == 32
    with pytest.raises(ValueError, match="128 cannot be split evenly among 3 processes: 129 could"):
        Ranks(world=3).share(128)
    with pytest.raises(ValueError, match="among 4 processes times accumulate=3: 12 could"):
        Ranks(world=4).share(8, 3)


def test_a_process_of_its_own_is_the_first_of_one():
    with joined() as here:
        assert here == current() == Ranks() and here.first
    values = torch.tensor([3.0])
    here.mean_([values])
    assert here.sum_(values) is values and values == 3.0
    assert here.decide(lambda: 7) == 7 and here.any(True) and not here.any(False)
    model = torch.nn.Linear(2, 2)
    assert here.replica(model) is model and list(here.turns(model, [1, 2, 3])) == [1, 2, 3]


def test_the_module_is_there_after_importing_granet():
    code = "import granet; print(granet.ranks.leave.__name__, granet.ranks.current().world)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "leave 1\n", done.stderr


def test_devices_are_checked():
    assert Ranks(rank=1, world=2, local=1, neighbours=2).device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="no device 'gpu'"):
        Ranks().device("gpu")
