"""Real processes, gloo: the same masks as one process has, whatever the number of ranks and the way of sharding."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import granet

METHODS = {
    "granet": lambda: granet.GraNet(sparsity=0.9, initial_sparsity=0.4, end=12, total=20, interval=3),
    "gmp": lambda: granet.GMP(sparsity=0.9, end=12, interval=3),
    "rigl": lambda: granet.RigL(sparsity=0.8, end=15, interval=3),
    "set": lambda: granet.SET(sparsity=0.8, total=20, interval=3),
}
STEPS = 16


def network():
    """Layers that divide by nothing; the last has fewer rows than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 18), nn.ReLU(), nn.Linear(18, 18), nn.ReLU(), nn.Linear(18, 14), nn.ReLU(), nn.Linear(14, 3)
    ).double()


def batch(step, part=slice(None)):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(8, 7, generator=rng, dtype=torch.float64)
    return x[part], torch.randint(0, 3, (8,), generator=rng)[part]


def train(model, sparsifier, optimizer, part=slice(None), steps=STEPS):
    for step in range(sparsifier.step, steps):
        x, y = batch(step, part)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(name):
    model = network()
    sparsifier = granet.Sparsifier(model, METHODS[name](), seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    train(model, sparsifier, optimizer)
    return model, sparsifier


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def prepare(kind, world):
    """The network as the ranks hold it, and the part of the batch that this rank sees."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = network()
    if kind == "ddp":
        return model, nn.parallel.DistributedDataParallel(model), world, dist.get_rank()
    if kind == "fsdp":
        for layer in model[:4:2]:
            fully_shard(layer)
        fully_shard(model)
        return model, model, world, dist.get_rank()
    if kind == "hybrid":  # replicated over one dimension, sharded over the other
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model, model, world, dist.get_rank()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(
        model,
        mesh["tp"],
        {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()},
    )
    fully_shard(model, mesh=mesh["dp"])
    return model, model, world // 2, mesh["dp"].get_local_rank()


def begin(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)


def equal_to_one_process(rank, world, folder, kind, names):
    begin(rank, world, folder)
    for name in names:
        model, forward, parts, mine = prepare(kind, world)
        sparsifier = granet.Sparsifier(model, METHODS[name](), seed=5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier.attach(optimizer)
        size = 8 // parts
        train(forward, sparsifier, optimizer, slice(mine * size, (mine + 1) * size))
        expected, other = alone(name)
        assert sparsifier.counts == other.counts
        assert sparsifier.exploration == other.exploration
        assert sparsifier.last_update.grown == other.last_update.grown
        reference = dict(expected.named_parameters())
        for key, mask in sparsifier.masks.items():
            assert torch.equal(whole(mask), other.masks[key]), (name, key)
        for key, p in model.named_parameters():
            torch.testing.assert_close(whole(p.detach()), reference[key].detach(), rtol=1e-9, atol=1e-11)
            if key in sparsifier.masks:
                for value in optimizer.state[p].values():
                    if value.shape == p.shape:
                        assert not whole(value)[~whole(sparsifier.masks[key])].any()
        assert str(sparsifier.report()) == str(other.report())
    dist.destroy_process_group()


def spawn(function, world, tmp_path, *args):
    mp.start_processes(function, args=(world, tmp_path, *args), nprocs=world, start_method="spawn")


@pytest.mark.parametrize(
    ("kind", "world", "names"),
    [
        ("ddp", 2, list(METHODS)),
        ("fsdp", 2, list(METHODS)),
        ("fsdp", 4, ["granet"]),
        ("hybrid", 4, ["granet"]),
        ("tensor-parallel", 4, ["granet", "set"]),
    ],
)
def test_masks_and_weights_equal_those_of_one_process(kind, world, names, tmp_path):
    spawn(equal_to_one_process, world, tmp_path, kind, names)
