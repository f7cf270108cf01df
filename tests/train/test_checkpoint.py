import json
import logging
import os
import subprocess
import sys
import zlib

import pytest
import torch
from safetensors.torch import load_file

from granet.train import checkpoint
from granet.train.checkpoint import CheckpointError


def example(value=0.0):
    generator = torch.Generator().manual_seed(1)
    model = {"w": torch.randn(3, 4, generator=generator), "n": torch.tensor(7), "half": torch.ones(2).bfloat16()}
    model["tied"] = model["w"]
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "buffer": model["w"].t()}},
            "groups": [{"betas": (0.9, 1)}],
        },
        "mask": torch.tensor([True, False]),
        "numbers": [1, 0.1 + 0.2, None, True, "x", float("inf"), value],
        "empty": {"dict": {}, "list": [], "tensor": torch.zeros(0)},
        "$odd": 1,
    }
    return model, state


def save(folder, step, value=0.0, **options):
    model, state = example(value)
    return checkpoint.save(folder, step=step, model=model, state=state, **options)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_what_is_saved_comes_back(tmp_path):
    model, state = example()
    found = checkpoint.load(save(tmp_path, 12))
    assert found.step == 12
    assert same(found.model, model)
    assert same(found.state, state)


def test_without_zeros_it_comes_back_bit_for_bit(tmp_path):
    """Also what has names as torch's pruning gives them."""
    model, state = example()
    mask = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) < 0.1
    model |= {"a_orig": torch.randn(100, 100).where(mask, 0), "a_mask": mask.float()}
    model["a_orig"][0, :50], model["a_orig"][0, 50:] = float("nan"), -0.0
    state["masks"] = {"a_orig": mask}
    sizes = []
    for compress in (False, True):
        path = checkpoint.save(tmp_path / str(compress), step=1, model=model, state=state, compress=compress)
        found = checkpoint.load(path)
        assert found.model.keys() == model.keys() and same(found.state, state)
        for name, tensor in model.items():
            raw = torch.stack([x.reshape(-1).view(torch.uint8) for x in (tensor, found.model[name])])
            assert torch.equal(*raw), name
        sizes.append(sum(file.stat().st_size for file in path.iterdir()))
    assert sizes[1] < 0.3 * sizes[0]


def test_the_model_file_is_plain_safetensors_with_the_models_own_keys(tmp_path):
    path = save(tmp_path, 1)
    assert set(load_file(path / "model.safetensors")) == {"w", "n", "half", "tied"}


def test_what_cannot_be_held_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="a/b is a set"):
        checkpoint.save(tmp_path, step=1, model={}, state={"a": {"b": {1, 2}}})
    assert not list(tmp_path.iterdir())


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / ".00000050.1").mkdir()  # of a process that was killed while it wrote
    checkpoint.prune(tmp_path, keep=2, also={10})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000030", "00000040"]


def test_saving_again_at_the_same_step_replaces(tmp_path):
    save(tmp_path, 10, value=1.0)
    save(tmp_path, 10, value=2.0)
    assert checkpoint.load(tmp_path / "00000010").state["numbers"][-1] == 2.0
    assert len(list(tmp_path.iterdir())) == 1


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def foreign(path):
    path.write_text('{"format": "pt"}' if path.suffix == ".json" else "not tensors")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", [truncate, flip, foreign, os.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage, name, compress):
    save(tmp_path, 10)
    path = save(tmp_path, 20, compress=compress)
    damage(path / name)
    with pytest.raises(CheckpointError, match="00000020") as error:
        checkpoint.load(path)
    assert name in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_latest(tmp_path).step == 10
    assert "00000020" in caplog.text
    assert "going back to step 10" in caplog.text


def test_numbers_that_were_changed_are_found(tmp_path, caplog):
    save(tmp_path, 1)
    file = save(tmp_path, 2, value=5.0) / "state.json"
    file.write_text(file.read_text().replace("5.0", "1.0"))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_latest(tmp_path).step == 1
    assert "state.json is altered" in caplog.text
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crc32": 3}))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(file.parent)


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    (tmp_path / f".00000003.{os.getpid()}").mkdir()
    assert checkpoint.load(save(tmp_path, 3)).step == 3


def test_no_checkpoint_and_no_intact_checkpoint(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "nowhere") is None
    truncate(save(tmp_path, 3) / "model.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        checkpoint.load_latest(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    path = save(tmp_path, 3)
    torch.save({"format": checkpoint.FORMAT}, path / "state.safetensors")  # a pickle under a trusted name
    head = json.loads((path / "state.json").read_text())
    head["crc32"]["state.safetensors"] = zlib.crc32((path / "state.safetensors").read_bytes())
    (path / "state.json").write_text(json.dumps(head))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.load(path)


FULL = """
import resource, sys, torch
from pathlib import Path
from granet.train import checkpoint
folder = Path(sys.argv[1])
model = {"w": torch.ones(100_000)}
checkpoint.save(folder, step=1, model=model, state={})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a write beyond it fails like one on a full disk
try:
    checkpoint.save(folder, step=2, model=model, state={})
except checkpoint.CheckpointError as error:
    print(error)
    sys.exit(3)
"""


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 3, run.stderr
    assert "00000002 (0.4 MB) could not be written: File too large" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    assert torch.equal(checkpoint.load_latest(tmp_path).model["w"], torch.ones(100_000))


def test_replacing_a_file_is_all_or_nothing(tmp_path):
    file = tmp_path / "summary.json"
    checkpoint.replace(file, "old")
    checkpoint.replace(file, "new")
    assert file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_buffers_take_the_layout_of_their_parameter():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    buffer = state["state"][0]["momentum_buffer"]
    state["state"][0]["momentum_buffer"] = buffer.clone(memory_format=torch.contiguous_format)
    checkpoint.restore_layout(state, optimizer)
    restored = optimizer.state[weight]["momentum_buffer"]
    assert restored.stride() == weight.stride()
    assert torch.equal(restored, buffer)


def test_a_full_disk_without_an_older_checkpoint_promises_none(tmp_path):
    (tmp_path / "checkpoints").touch()  # nothing can be written here
    with pytest.raises(CheckpointError, match="There is no checkpoint before it; make room and resume"):
        checkpoint.save(tmp_path / "checkpoints", step=1, model={}, state={})
