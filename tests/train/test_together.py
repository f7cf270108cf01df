"""Ranks that see different files, or fail alone: they agree, or all end with the message of the one that failed."""

import json
import os
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import granet
import together
from granet.integrations.distributed_checkpoint import load as load_shards
from granet.ranks import RankError, current, leave
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute, load_weights
from granet.train.trainer import Trainer


def recipe(name="run", **changes):
    """Handwritten digits, twenty steps."""
    values = recipes.load("digits").model_dump()
    values["train"] |= {"epochs": 1, "warmup": 0, "batch_size": 64, "evaluate": 4, "checkpoint": 8, "log": 4}
    values["method"] |= {"interval": 5, "end": 15}
    return validate(values | {"name": name} | changes, source="test")


def begin(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=120))


def spawn(function, folder, *args):
    together.start(function, 2, folder, *args)


def delay(folder, seconds):
    """From now on this process waits whenever it opens, lists, makes, renames or removes a file in `folder`."""

    def hook(event, args):
        if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove") and str(
            args[0]
        ).startswith(str(folder)):
            time.sleep(seconds)

    sys.addaudithook(hook)


def train_with_one_delayed(rank, world, folder, slow):
    begin(rank, world, folder)
    runs = folder / "runs"
    if rank == slow:
        delay(runs, 0.05)
    said = []
    asked = iter(range(1000))
    run = Run.for_recipe(recipe(), runs)
    said.append(execute(run, stop=lambda: rank == 1 and next(asked) == 9))
    said += [execute(Run.for_recipe(recipe(), runs)) for _ in range(2)]
    trainer = Trainer(recipe())
    said += [load_weights(run, trainer, which) for which in ("best", "last")]
    (folder / f"{rank}.json").write_text(json.dumps(said))
    leave()


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_agree_on_files_that_one_of_them_sees_later(slow, tmp_path):
    spawn(train_with_one_delayed, tmp_path, slow)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    stopped, finished, again, best, last = first
    assert first == second and stopped is None and finished == again and best <= last == 20
    (file,) = tmp_path.glob("runs/*/metrics.jsonl")
    steps = [r["step"] for r in map(json.loads, file.read_text().splitlines()) if r["kind"] == "train"]
    assert steps == [4, 8, 12, 16, 20]


def missing_data(rank, folder):
    from PIL import Image

    os.environ["GRANET_DATA"] = str(folder / f"data{rank}")
    if rank == 1:
        for split in ("train", "val"):
            (folder / "data1" / "imagenet" / split / "one").mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (8, 8)).save(folder / "data1" / "imagenet" / split / "one" / f"{i}.png")
    values = recipes.load("imagenet-resnet50").model_dump()
    values["data"]["validation"] = 2
    Trainer(validate(values, source="test"))


def different_data(rank, folder):
    Trainer(recipe(data=recipe().data.model_dump() | {"validation": 0.2 if rank else 0.1}))


def different_recipes(rank, folder):
    execute(Run.for_recipe(recipe(seed=rank), folder / "different"))


def a_file_in_the_way(rank, folder):
    run = Run.for_recipe(recipe("blocked"), folder)
    if rank == 0:
        (run.path / "metrics.jsonl").mkdir(parents=True)
    execute(run)


def no_checkpoint_written(rank, folder):
    run = Run.for_recipe(recipe("full"), folder)
    if rank == 0:
        run.path.mkdir(parents=True)
        run.checkpoints.touch()
    execute(run)


def damaged_checkpoints(rank, folder):
    run = Run.for_recipe(recipe("damaged"), folder)
    if rank == 0:
        (run.checkpoints / "00000004").mkdir(parents=True)
        (run.checkpoints / "00000004" / "state.json").touch()
    execute(run)


def trained_already(rank, folder):
    run = Run.for_recipe(recipe("held"), folder)
    run.path.mkdir(parents=True, exist_ok=True)
    with run.locked() if rank else nullcontext():
        dist.barrier()
        execute(run)


def a_failing_watcher(rank, folder):
    def watch(trainer, record):
        raise ValueError("the watcher has seen enough")

    execute(Run.for_recipe(recipe("watched"), folder), watch=watch)


def no_weights(rank, folder):
    load_weights(Run.for_recipe(recipe("nothing"), folder), Trainer(recipe()), "last")


def no_shards(rank, folder):
    model = torch.nn.Linear(4, 4)
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    load_shards(folder / "nothing", model, optimizer, sparsifier)


def a_broken_image(rank, folder):
    def images():
        yield 1
        if rank == 1:
            raise ValueError("2.png is no readable image")
        yield 2

    for _ in current().each(images()):
        current().decide(lambda: None)


# what is tried, the rank that fails by itself, and the message that both end with
FAILURES = {
    missing_data: (0, "FileNotFoundError: imagenet is not on this machine"),
    different_data: (1, "ValueError: the data (images and checksum of their labels): rank 1 has"),
    different_recipes: (1, "ValueError: the run (its directory's name tells recipes apart): rank 1 has"),
    a_file_in_the_way: (0, "FileError: "),
    no_checkpoint_written: (0, "CheckpointError: the checkpoint "),
    damaged_checkpoints: (0, "CheckpointError: no checkpoint is intact"),
    trained_already: (0, "RecipeError: "),
    a_failing_watcher: (0, "ValueError: the watcher has seen enough"),
    no_weights: (0, "CheckpointError: "),
    no_shards: (0, "FileNotFoundError: "),
    a_broken_image: (1, "ValueError: 2.png is no readable image"),
}


def probe_other_batches(rank):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3))
    torch.manual_seed(1 + rank)
    batch = torch.randn(8, 20), torch.randint(0, 3, (8,))
    for method in (granet.SNIP(sparsity=0.8), granet.GraSP(sparsity=0.8), granet.SynFlow(sparsity=0.8)):
        other = granet.Sparsifier(deepcopy(model), method, probe=granet.Probe(model, [batch]), verify_every=0)
        copied = deepcopy(model)
        sparsifier = granet.Sparsifier(copied, method, probe=granet.Probe(copied, [batch]))
        sparsifier.attach(torch.optim.SGD(copied.parameters(), lr=0.1))
        yield all(torch.equal(mask, other.masks[name]) for name, mask in sparsifier.masks.items())


def accelerate_together(rank):
    """The report of a plan that was made on both ranks and followed an update, which rank 0 evaluated alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.ReLU(), torch.nn.Linear(400, 10))
    sparsifier = granet.Sparsifier(model, granet.GMP(sparsity=0.97, end=2, interval=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    plan = granet.accelerate(sparsifier, torch.randn(64, 300))
    for _ in range(3):
        model(torch.randn(64, 300)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with torch.no_grad():
                model(torch.randn(64, 300))
    return str(plan.report())


def fail_alone(rank, world, folder):
    begin(rank, world, folder)
    said = {}
    for work in FAILURES:
        began = time.monotonic()
        try:
            work(rank, folder)
        except Exception as error:
            said[work.__name__] = [type(error).__name__, str(error), time.monotonic() - began]
    said["plan"] = accelerate_together(rank)
    said["own masks"] = list(probe_other_batches(rank))
    (folder / f"{rank}.json").write_text(json.dumps(said))
    leave()


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failed")
    spawn(fail_alone, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("work", FAILURES, ids=lambda work: work.__name__)
def test_what_fails_on_one_rank_fails_on_all_with_its_message_and_the_group_goes_on(failed, work):
    rank, message = FAILURES[work]
    kind, said, _ = failed[rank][work.__name__]
    assert f"{kind}: {said}".startswith(message)
    other, told, seconds = failed[1 - rank][work.__name__]
    assert (other, told) == ("RankError", f"rank {rank} failed: {kind}: {said}") and seconds < 60


def test_kernels_are_chosen_by_the_clock_of_the_first_rank(failed):
    """Every rank would measure other times, and so might choose others."""
    assert failed[0]["plan"] == failed[1]["plan"]
    assert " ms" in failed[0]["plan"]


def fail_within_a_step(rank, world, folder, way):
    begin(rank, world, folder)
    asked = iter(range(1000))

    def stop():
        if rank == 1 and next(asked) == 3:
            if way == "dies":
                os._exit(0)
            raise ValueError("no more of this")
        return False

    try:
        execute(Run.for_recipe(recipe(), folder), stop=stop)
    except (ValueError, ConnectionError) as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # a group that lost a member cannot be left in order


@pytest.mark.parametrize("way", ["raises", "dies"])
def test_a_rank_lost_within_a_step_ends_the_others_with_its_message(way, tmp_path):
    spawn(fail_within_a_step, tmp_path, way)
    told = (tmp_path / "0.txt").read_text()
    if way == "dies":
        assert told.startswith("ConnectionError: the other processes are gone, or do not answer")
    else:
        assert (tmp_path / "1.txt").read_text() == "ValueError: no more of this"
        assert told == "RankError: rank 1 failed: ValueError: no more of this"


def test_masks_of_a_probe_are_those_of_the_first_rank(failed):
    """Where ranks probe other batches, too: they would choose other masks, and attach would refuse them."""
    assert failed[0]["own masks"] == [True, True, True]
    assert False in failed[1]["own masks"]


def test_a_rank_error_is_a_lost_connection():
    """So that a program that catches the one catches the other, and the command line says it in one line."""
    assert issubclass(RankError, ConnectionError)
