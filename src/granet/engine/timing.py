"""Timing calls against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Spread:
    """What repeated runs of one call took, in milliseconds of wall time."""

    least: float
    median: float
    most: float
    runs: int

    def __str__(self) -> str:
        return f"{self.least:.2f} ms (median {self.median:.2f}, longest {self.most:.2f})"


def spreads(
    calls: Mapping[str, Callable[[], object]], *, warm: int = 2, rounds: int = 5, enough: float = 0.2
) -> dict[str, Spread]:
    """The wall time of each call, all treated alike: every one is warmed up, then they take turns.

    A call in a fresh process pays for memory and plans that later ones find ready, up to twice its usual time, so the
    first `warm` rounds are not measured. Each measured round begins with another call than the one before it. There are
    `rounds` of them, and more, six times as many at most, while they have taken less than `enough` seconds together.
    """
    for _ in range(warm):
        for call in calls.values():
            call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    order, begin, done = list(calls), time.perf_counter(), 0
    while done < rounds or (time.perf_counter() - begin < enough and done < 6 * rounds):
        for name in order:
            start = time.perf_counter()
            calls[name]()
            spent[name].append((time.perf_counter() - start) * 1e3)
        order, done = [*order[1:], order[0]], done + 1
    return {name: Spread(min(t), statistics.median(t), max(t), len(t)) for name, t in spent.items()}
