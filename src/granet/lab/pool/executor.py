"""Calls of one function with many arguments, spread over processes, a Ray cluster or a Slurm cluster.

A job is a top-level function and plain data, so that it can run anywhere. On this machine each process takes one job
after the other; a job that fails takes its process with it, whatever the cause, and the others go on.

>>> import math
>>> from granet.lab.pool import executor
>>> sorted(outcome.value for outcome in executor.map(math.sqrt, [(4.0,), (9.0,)], jobs=1))
[2.0, 3.0]
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

from granet.train.recipe import suggest

TAIL = 40  # lines that are kept of what a failed job wrote
MOMENT = 0.25  # seconds that a wait for jobs lasts at most
# Ctrl-C and a closed terminal reach all processes: it is for the parent to say what follows
FOR_THE_PARENT = (signal.SIGINT, signal.SIGHUP)

_stop = None  # in a process of the pool: the shared flag that asks its job to end


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
    """Returns whether the job that asks should save and end; long jobs look now and then."""
    return _stop is not None and bool(_stop.value)


def cores() -> int:
    """Returns the number of processors."""
    return os.cpu_count() or 1


def check(executor: str, jobs: int | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Looks at what `map` would be asked for, and starts nothing.

    Raises:
        ValueError: there is no such executor, it has no such options, or no job would run.
        ModuleNotFoundError: the executor's library is not installed; the message names the extra.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs}: at least one must run")
    if executor not in EXECUTORS:
        raise ValueError(f"there is no executor {executor!r}; {suggest(executor, EXECUTORS)}")
    if executor == "local" and options:
        raise ValueError(f"the local executor has no options, got {', '.join(options)}")
    library = LIBRARIES.get(executor)
    if library is not None and find_spec(library) is None:
        raise ModuleNotFoundError(f'the executor {executor} needs {library}: pip install "granet[{executor}]"')


def map(
    function: Callable,
    arguments: Iterable[tuple],
    *,
    executor: str = "local",
    jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Yields the outcome of ``function(*argument)`` for each of the arguments, as they end.

    Args:
        function: a top-level function of a module that can be imported.
        arguments: tuples of plain data.
        executor: ``local`` for processes of this machine, ``ray``, or ``slurm``.
        jobs: how many run at a time; None for one a processor here, and for all at once on a cluster.
        options: of the executor: for ``ray`` those of a task (``num_gpus``), for ``slurm`` those of submitit's
            ``update_parameters`` (``timeout_min``, ``slurm_partition``), and ``cluster`` and ``folder``.
        stop: asked several times a second; once True, no more jobs start, and those that run are asked to end.

    Raises:
        ValueError: the function cannot be imported elsewhere, or there is no such executor.
        ModuleNotFoundError: the executor's library is not installed; the message names the extra.
    """
    if function.__module__ == "__main__" or "<" in function.__qualname__ or "." in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} of {function.__module__} cannot be imported by another process: "
            "give a function at the top level of a module"
        )
    check(executor, jobs, options)
    waiting, running, stopped = deque(arguments), 0, False
    with closing(EXECUTORS[executor](jobs, dict(options or {}))) as place:
        while True:
            if not stopped and stop():
                stopped = True
                waiting.clear()
                place.stop()
            free = len(waiting) if place.jobs is None else min(place.jobs - running, len(waiting))
            if free:
                place.submit(function, [waiting.popleft() for _ in range(free)])
                running += free
            if not running:
                return
            for outcome in place.wait():
                running -= 1
                yield outcome


class Local:
    """Processes of this machine, each with its share of the processors."""

    def __init__(self, jobs: int | None, options: dict[str, Any]):
        self.jobs = jobs or cores()
        # the word of the user's environment counts
        self._threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // self.jobs))
        self._context = multiprocessing.get_context("spawn")
        self._asked = self._context.RawValue("b", 0)  # without a lock, which a killed process might hold
        self._folder = tempfile.TemporaryDirectory(prefix="granet-pool-")
        self._started = 0
        self._idle: list[_Worker] = []
        self._busy: dict[multiprocessing.connection.Connection, _Worker] = {}

    def submit(self, function: Callable, arguments: list[tuple]) -> None:
        """Gives each argument to a process that is free, or to a new one."""
        for argument in arguments:
            worker = self._idle.pop() if self._idle else self._start()
            worker.take(function, argument)
            self._busy[worker.pipe] = worker

    def _start(self) -> "_Worker":
        self._started += 1
        return _Worker(self._context, self._asked, self._threads, Path(self._folder.name) / f"{self._started}.txt")

    def wait(self) -> list[Outcome]:
        """Returns what has ended; a process that ended with its job is not used again."""
        ended = []
        for pipe in multiprocessing.connection.wait(list(self._busy), timeout=MOMENT):
            worker = self._busy.pop(pipe)
            outcome, alive = worker.result()
            ended.append(outcome)
            if alive:
                self._idle.append(worker)
        return ended

    def stop(self) -> None:
        """Lets `stopping` say so in every process."""
        self._asked.value = 1

    def close(self) -> None:
        """Ends the processes, those with a job by SIGTERM."""
        for worker in self._busy.values():
            worker.process.terminate()
        for worker in [*self._idle, *self._busy.values()]:
            worker.end()
        self._folder.cleanup()


class _Worker:
    """A process of the pool, seen from outside."""

    def __init__(self, context, asked, threads: str, log: Path):
        self.pipe, theirs = context.Pipe()
        self._log = log
        self._argument: tuple = ()
        self.process = context.Process(target=_work, args=(theirs, asked, threads, str(log)))
        resource_tracker.ensure_running()  # it would unblock signals when the first process starts it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)  # the process begins with these blocked
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # or its end would never show

    def take(self, function: Callable, argument: tuple) -> None:
        self._argument = argument
        self.pipe.send((function, argument))

    def result(self) -> tuple[Outcome, bool]:
        """Returns how its job ended, and whether the process lives."""
        try:
            return Outcome(self._argument, self.pipe.recv()), True
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            lines = self._log.read_text(errors="replace").splitlines()[-TAIL:] if self._log.exists() else []
            if code < 0:
                lines.append(f"the process was ended by {signal.Signals(-code).name}")
            self.end()
            return Outcome(self._argument, error="\n".join(lines) or f"the process ended with exit code {code}"), False

    def end(self) -> None:
        self.pipe.close()
        self.process.join()
        self.process.close()


def _work(pipe: multiprocessing.connection.Connection, asked, threads: str, log: str) -> None:
    """A process of the pool, from inside: takes jobs until the pipe is closed; what it writes goes to ``log``."""
    global _stop
    _stop = asked
    for number in FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_PARENT)
    os.environ["OMP_NUM_THREADS"] = threads  # read when torch is loaded, which a job does
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    faulthandler.enable()
    while True:
        os.ftruncate(out, 0)
        try:
            function, argument = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*argument))  # what it raises ends the process, its traceback the last lines of the log


def _ray(jobs: int | None, options: dict[str, Any]) -> Executor:
    from granet.lab.pool.cluster import Ray

    return Ray(jobs, options)


def _slurm(jobs: int | None, options: dict[str, Any]) -> Executor:
    from granet.lab.pool.cluster import Slurm

    return Slurm(jobs, options)


EXECUTORS: dict[str, Callable[[int | None, dict[str, Any]], Executor]] = {
    "local": Local,
    "ray": _ray,
    "slurm": _slurm,
}
LIBRARIES = {"ray": "ray", "slurm": "submitit"}  # what an executor needs, which the extra of its name installs
