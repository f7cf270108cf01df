"""Timing calls against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

NOISE = 0.03  # a win must exceed this share of the time, the scatter of repeated minima on a quiet machine


def seconds() -> float:
    """The time on a clock: processor time where torch has one thread, so that other processes count little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def milliseconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """The shortest timing of `call` in milliseconds; see `interleaved`."""
    return interleaved([call], repeats=repeats)[0]


def interleaved(calls: Sequence[Callable[[], object]], *, repeats: int = 5, enough: float = 0.05) -> list[float]:
    """The shortest timing of each call in milliseconds, the calls taking turns so that noise hits all alike.

    There are `repeats` rounds after one unmeasured, and more while they have taken less than `enough` seconds together:
    a short call is more easily disturbed.
    """
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats or (time.perf_counter() - begin < enough and rounds < 10 * repeats):
        for i, call in enumerate(calls):
            start = seconds()
            call()
            best[i] = min(best[i], seconds() - start)
        rounds += 1
    return [b * 1e3 for b in best]
