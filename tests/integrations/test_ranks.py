"""Two processes each, gloo: the topology is that of one process on the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problem import STEPS, Network, Problem, Text

import granet

HERE = Path(__file__).parent


def run(stacks, folder):
    """Two processes that train by one stack after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "shim"), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "ranks.py", *stacks, folder],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


def check(name, folder, expected=None):
    """That what two ranks have is what one process has, after the plain loop unless told."""
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
    if expected is None:
        problem = Problem(torch.float64)
        expected = problem.plain(optimizer="adamw", accumulate=2, make=lambda: Network().double())[1]
    weights = {name: p.detach() for name, p in expected.model.named_parameters()}
    assert first["shards"] == (len(weights) if name.endswith("fsdp2") else 0)
    assert first["step"] == expected.step == STEPS // 2 and expected.version >= 3
    for ours in (first, second):
        # a Lightning module may have the model as an attribute
        assert len(ours["masks"]) == len(expected.masks) and len(ours["weights"]) == len(weights)
        for key, mask in ours["masks"].items():
            assert torch.equal(mask, expected.masks[key.removeprefix("model.")])
        for key, weight in ours["weights"].items():
            torch.testing.assert_close(weight, weights[key.removeprefix("model.")], rtol=1e-8, atol=1e-10)
            assert torch.equal(weight, first["weights"][key])


# the ways of one library in the same processes, whose start takes longer than all that they do
@pytest.mark.slow
def test_lightning_and_fabric(tmp_path):
    pytest.importorskip("lightning", reason='needs pip install "granet[lightning]"')
    names = ["fabric-ddp", "fabric-fsdp2", "lightning-ddp", "lightning-fsdp2"]
    run(names, tmp_path)
    for name in names:
        check(name, tmp_path)


@pytest.mark.slow
def test_timm(tmp_path):
    pytest.importorskip("timm", reason='needs pip install "granet[timm]"')
    run(["timm-ddp"], tmp_path)
    check("timm-ddp", tmp_path)


@pytest.mark.slow
def test_accelerate_and_hugging_face(tmp_path):
    pytest.importorskip("transformers", reason='needs pip install "granet[huggingface]"')
    pytest.importorskip("accelerate", reason='needs pip install "granet[accelerate]"')
    names = ["accelerate-ddp", "accelerate-fsdp2", "huggingface-ddp"]
    text, problem = Text(), Problem()
    text.write(tmp_path)
    run([*names, "huggingface-fsdp2"], tmp_path)
    for name in names:
        check(name, tmp_path)

    sparsifier = granet.Sparsifier(text.model(tmp_path), problem.method(), seed=7, only=text.layers)
    optimizer = problem.optimizer(sparsifier.model, "adamw")
    sparsifier.attach(optimizer)
    for rows in text.rows.split(2 * text.batch):
        text.loss(sparsifier.model(input_ids=rows), rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    check("huggingface-fsdp2", tmp_path, sparsifier)
    saved = torch.load(tmp_path / "out" / "checkpoint-12" / "sparsifier.pt", weights_only=True)
    for name, mask in sparsifier.masks.items():
        assert torch.equal(saved["masks"][name], mask)  # in one piece
