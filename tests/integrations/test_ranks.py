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
NEEDS = {"lightning": "lightning", "fabric": "lightning", "accelerate": "accelerate", "huggingface": "transformers"}


@pytest.mark.parametrize("stack", NEEDS)
def test_two_processes_have_the_topology_of_one(stack, tmp_path):
    extra = "lightning" if stack == "fabric" else stack
    pytest.importorskip(NEEDS[stack], reason=f'needs pip install "granet[{extra}]"')
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
            [sys.executable, "-W", "ignore", HERE / "ranks.py", stack, tmp_path],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

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
