"""Groups of real processes that start with torch and granet imported: importing them takes longer than most tests."""

import multiprocessing

import torch.multiprocessing as mp

IMPORTED = ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "granet.sparsifier", "granet.train.run")


def context():
    """Returns the context of processes that are forks of one that has imported `IMPORTED` and done nothing else."""
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    return mp.get_context("forkserver")


def start(function, world, *args):
    """Calls `function(rank, world, *args)` in `world` processes, waits for them, and raises the error of any."""
    method = context().get_start_method()
    mp.start_processes(function, args=(world, *args), nprocs=world, start_method=method)
