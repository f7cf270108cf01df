"""What an executor is: where the jobs of a pool run, and how they end."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

TAIL = 40  # last lines that are kept of what a failed job wrote
MOMENT = 0.25  # longest wait for jobs, in seconds

_stop = None  # in a process of the pool: the shared flag that is set when its job should end


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with a value, or with the last lines that it wrote before it failed."""

    argument: tuple
    value: Any = None
    error: str | None = None


class Executor(Protocol):
    """Where jobs run."""

    def submit(self, function: Callable, arguments: list[tuple]) -> None:
        """Starts a job for each argument."""

    def wait(self) -> list[Outcome]:
        """Returns the jobs that have ended since the last call, none after a moment without any."""

    def stop(self) -> None:
        """Asks all jobs that run to end soon."""

    def close(self) -> None:
        """Ends at once whatever still runs."""


def stopping() -> bool:
    """Returns whether the calling job should save and end; long jobs ask now and then."""
    return _stop is not None and bool(_stop.value)


def asked_by(flag) -> None:
    """Makes `stopping` read this shared flag; called once in each process of a pool."""
    global _stop
    _stop = flag


def cores() -> int:
    """Returns the number of processors."""
    return os.cpu_count() or 1
