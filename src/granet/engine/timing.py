"""Timing of calls against each other, and the rule by which one of them is faster."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from granet.ranks import Ranks

NOISE = 0.03  # a smaller share of the time is no win: repeated measurements on a quiet machine differ by as much


@dataclass(frozen=True)
class Spread:
    """The times that repeated runs of one call took, in milliseconds."""

    least: float
    median: float
    most: float
    runs: int

    @classmethod
    def from_seconds(cls, times: Sequence[float]) -> Spread:
        """Returns the spread of single times in seconds."""
        spent = [1e3 * one for one in times]
        return cls(min(spent), statistics.median(spent), max(spent), len(spent))

    def is_faster_than(self, other: Spread) -> bool:
        """Returns whether both the shortest time and the median are below the other's by more than `NOISE`.

        The shortest time alone is not enough: on a busy machine a call that is usually slower may be lucky once. If the
        two disagree, neither call is the faster one.
        """
        share = 1 - NOISE
        return self.least < other.least * share and self.median < other.median * share

    def __str__(self) -> str:
        return f"{self.least:.2f} ms (median {self.median:.2f}, longest {self.most:.2f})"


def seconds() -> float:
    """Returns the time on a clock: processor time if torch has one thread, which other processes hardly affect."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def milliseconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """Returns the shortest time of a call in milliseconds; see `time_in_turns`."""
    return interleaved([call], repeats=repeats)[0]


def interleaved(calls: Sequence[Callable[[], object]], *, repeats: int = 5, enough: float = 0.05) -> list[float]:
    """Returns the shortest time of each call in milliseconds; see `time_in_turns`."""
    return [spread.least for spread in time_in_turns(calls, repeats=repeats, enough=enough)]


def time_in_turns(calls: Sequence[Callable[[], object]], *, repeats: int = 5, enough: float = 0.05) -> list[Spread]:
    """Returns the times of each call by the clock of `seconds`. The calls take turns, so that noise affects them alike.

    There are `repeats` rounds after one that is not measured, and up to ten times as many while they have taken less
    than `enough` seconds together, because a short call is more easily disturbed.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats or (time.perf_counter() - begin < enough and rounds < 10 * repeats):
        for call, spent in zip(calls, times, strict=True):
            start = seconds()
            call()
            spent.append(seconds() - start)
        rounds += 1
    return [Spread.from_seconds(spent) for spent in times]


class Timings:
    """The times of calls, by key. Calls with the same key are measured once.

    Args:
        ranks: the processes that must agree. All of them use the first one's times.
    """

    def __init__(self, ranks: Ranks | None = None):
        self._ranks = ranks or Ranks()
        self._known: dict[Hashable, Spread] = {}

    def measure(self, calls: Mapping[Hashable, Callable[[], object]]) -> list[Spread]:
        """Returns the times of the calls, in order. Those that are not known yet are measured now, in turns."""
        missing = [key for key in calls if key not in self._known]
        measure = functools.partial(time_in_turns, [calls[key] for key in missing], repeats=3, enough=0.02)
        measured = self._ranks.decide(measure)
        self._known |= dict(zip(missing, measured, strict=True))
        return [self._known[key] for key in calls]

    def clear(self) -> None:
        """Forgets all times."""
        self._known.clear()


def wall_times(
    calls: Mapping[str, Callable[[], object]], *, warm: int = 2, rounds: int = 5, enough: float = 0.2
) -> dict[str, Spread]:
    """Returns the wall time of each call. Every call is warmed up, then they take turns.

    The first calls in a process allocate memory and make plans, which takes up to twice the usual time, so the first
    `warm` rounds are not measured. Each measured round begins with a different call. There are `rounds` of them, and up
    to six times as many while they have taken less than `enough` seconds together.
    """
    for _ in range(warm):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, begin, done = list(calls), time.perf_counter(), 0
    while done < rounds or (time.perf_counter() - begin < enough and done < 6 * rounds):
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
        order, done = [*order[1:], order[0]], done + 1
    return {name: Spread.from_seconds(spent) for name, spent in times.items()}
