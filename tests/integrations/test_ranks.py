"""Two processes each, gloo: the topology is that of one process on the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problem import Network, Problem

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


def check(stack, folder):
    first, second = (torch.load(folder / f"{stack}-{rank}.pt", weights_only=True) for rank in range(2))
    problem = Problem(torch.float64)
    model, expected, _ = problem.plain(optimizer="adamw", accumulate=2, make=lambda: Network().double())
    assert first["step"] == expected.step == problem.steps // 2
    weights = dict(model.named_parameters())
    for name, mask in expected.masks.items():
        assert torch.equal(first["masks"][name], second["masks"][name])
        assert torch.equal(first["masks"][name], mask)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
        torch.testing.assert_close(weight, weights[name].detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_lightning_and_fabric(tmp_path):
    pytest.importorskip("lightning", reason='needs pip install "granet[lightning]"')
    run(["fabric", "lightning"], tmp_path)
    check("fabric", tmp_path)
    check("lightning", tmp_path)


@pytest.mark.slow
def test_accelerate_and_hugging_face(tmp_path):
    pytest.importorskip("transformers", reason='needs pip install "granet[huggingface]"')
    pytest.importorskip("accelerate", reason='needs pip install "granet[accelerate]"')
    run(["accelerate", "huggingface"], tmp_path)
    check("accelerate", tmp_path)
    check("huggingface", tmp_path)
