"""What a topology update costs where weights lie in shards: bytes sent and processor time, by weights and ranks.

    python benchmarks/distributed_update.py [--weights 1 4 16] [--ranks 1 2 4] [--repeats 3] [--out results/...md]

Processes on one machine, joined by gloo, hold a network of square layers under FSDP2 and make GraNet updates: gradual
pruning over all layers, then regeneration in each. Bytes are what a rank hands to the collectives, all of them, seen
below torch's dispatcher. Each process has one thread; its processor time does not depend on how many cores they share.
"""

import argparse
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from granet import GraNet, Sparsifier, shards

LAYERS = 8


class Traffic(TorchDispatchMode):
    """Counts the calls of collectives inside the `with`, and the bytes of the tensors given to them."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls += 1
            flat, _ = tree_flatten(args)
            self.bytes += sum(x.numel() * x.element_size() for x in flat if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


class Update:
    """A sharded network about to be updated, with gradients of some kind; no forward pass is needed for that."""

    def __init__(self, weights: int, repeats: int):
        side = round((weights / LAYERS) ** 0.5)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
        if dist.get_world_size() > 1:
            fully_shard(model)
        total = repeats + 2
        method = GraNet(sparsity=0.9, initial_sparsity=0.5, end=total, total=2 * total, interval=1)
        self.sparsifier = Sparsifier(model, method, verify_every=0)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.sparsifier.attach(self.optimizer, hooks=False)
        self.parameters = list(model.parameters())
        self.weights = LAYERS * side**2

    def __call__(self) -> tuple[float, float]:
        """Seconds of one update: on the clock, and of this process's processor."""
        for p in self.parameters:
            mine = torch.randn(shards.local(p).shape)  # each rank has its own part, so its own numbers
            p.grad = shards.like(mine, p) if shards.is_sharded(p) else mine
        self.sparsifier.before_step()
        self.optimizer.step()
        dist.barrier()
        clock, processor = time.perf_counter(), time.process_time()
        self.sparsifier.after_step()
        return time.perf_counter() - clock, time.process_time() - processor


def measure(rank, world, folder, sizes, repeats, out):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(f"{folder}/{world}", world))
    for size in sizes:
        update = Update(size, repeats)
        update()  # the first one finds its way: kernels, connections
        with Traffic() as traffic:
            update()
        traffic.calls, traffic.bytes = traffic.calls - 1, traffic.bytes - 1  # the barrier sends a byte
        taken = torch.tensor([update() for _ in range(repeats)]).min(0).values
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        dist.barrier()
        if rank == 0:
            out.put((update.weights, world, traffic.calls, traffic.bytes, *taken.tolist()))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=float, nargs="+", default=[1, 4, 16], help="millions of weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    out = mp.get_context("spawn").SimpleQueue()
    sizes = [int(millions * 1e6) for millions in args.weights]
    with tempfile.TemporaryDirectory() as folder:
        for world in args.ranks:
            mp.start_processes(measure, args=(world, folder, sizes, args.repeats, out), nprocs=world)
    rows = []
    while not out.empty():
        rows.append(out.get())

    lines = [
        "| weights | ranks | collectives | bytes a rank | processor ms a rank | clock ms |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for weights, world, calls, sent, clock, processor in sorted(rows):
        lines.append(f"| {weights:,} | {world} | {calls} | {sent:,} | {processor * 1e3:.1f} | {clock * 1e3:.1f} |")
    text = (
        f"# A topology update over shards: {LAYERS} layers, GraNet\n\n"
        f"`python benchmarks/distributed_update.py --repeats {args.repeats}`, {date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread a process, torch {torch.__version__}, gloo on one machine. The best of "
        f"{args.repeats} updates, on the slowest rank.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
