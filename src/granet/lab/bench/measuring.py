"""Latency of engines that take turns, and throughput of sessions that run at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from granet.engine.timing import Spread

LEAST_RUNS = 5


@dataclass(frozen=True)
class Latency:
    """The milliseconds that calls took: the least, percentiles, and the number of calls."""

    least: float
    p50: float
    p90: float
    p99: float
    runs: int

    @classmethod
    def from_seconds(cls, times: Sequence[float]) -> Latency:
        """Returns the latency of single times in seconds."""
        spent = 1e3 * np.asarray(times)
        return cls(float(spent.min()), *(float(one) for one in np.percentile(spent, (50, 90, 99))), len(spent))

    def is_faster_than(self, other: Latency) -> bool:
        """Returns whether the least and the median are below the other's by more than noise."""
        return self._spread.is_faster_than(other._spread)

    @property
    def _spread(self) -> Spread:
        return Spread(self.least, self.p50, self.p99, self.runs)


def latencies(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Returns the latency of each call. They take turns for so many seconds, at least five rounds.

    Before each measured call an unmeasured one leaves the caches and the clock of the processor as this engine needs
    them. Each round begins with a different call.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_RUNS or time.perf_counter() < end:
        for name in order:
            calls[name]()
            begin = clock()
            calls[name]()
            spent[name].append(clock() - begin)
        order, rounds = [*order[1:], order[0]], rounds + 1
    return {name: Latency.from_seconds(times) for name, times in spent.items()}


def throughput(calls: Sequence[Callable[[], object]], *, examples: int, seconds: float) -> float:
    """Returns the examples per second of all calls together, each of which is repeated in a thread of its own.

    Args:
        calls: one for each thread; each computes `examples` examples.
        examples: the number of examples in a call.
        seconds: how long they run, after one call of each by itself.

    Raises:
        Exception: what a call raised in its thread.
    """
    together, first = threading.Barrier(len(calls)), threading.Lock()
    counts, spans, failures = [0] * len(calls), [1.0] * len(calls), []

    def repeat(i: int) -> None:
        try:
            with torch.no_grad():
                with first:  # what is compiled or packed at a thread's first call
                    calls[i]()
                together.wait()
                begin = time.perf_counter()
                while not counts[i] or spans[i] < seconds:
                    calls[i]()
                    counts[i], spans[i] = counts[i] + 1, time.perf_counter() - begin
        except threading.BrokenBarrierError:
            pass  # another thread failed
        except Exception as error:  # raised below, in the thread that measures
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=repeat, args=(i,), daemon=True) for i in range(len(calls))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if failures:
        raise failures[0]
    return sum(examples * count / span for count, span in zip(counts, spans, strict=True))
