"""Jobs for the pool's tests: a process of the pool imports them by name."""

import os
import sys
import time
from pathlib import Path

from granet.lab import pool


def square(x):
    return x * x


def where(_):
    return os.getpid(), os.environ["OMP_NUM_THREADS"]


def fail(how):
    print("before it failed", flush=True)
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "exit":
        sys.exit(3)
    if how == "abort":
        os.abort()
    raise KeyError(how)


def until_asked(folder):
    """Says that it has begun, and goes on until it is to stop."""
    Path(folder, f"{os.getpid()}.begun").touch()
    while not pool.stopping():
        time.sleep(0.01)
    return "saved"


def meet(folder, count):
    """Ends when so many jobs are at work at the same time."""
    Path(folder, str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError("alone")
        time.sleep(0.01)
    return count
