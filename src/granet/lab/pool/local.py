"""An executor of processes on this machine.

A pool library would replace little of it. In loky, a process that dies breaks the whole pool and fails the other jobs.
Pebble keeps the pool alive, but replaces a process in a thread of its own, where the signals of the terminal cannot be
blocked for the start alone, and knows only the exit code of a job that died. The log of each job, the shared flag that
asks jobs to save and end, and the shares of the processors would remain ours; only the lists of idle and busy processes
would go.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from granet.lab.pool.executor import MOMENT, TAIL, Outcome, asked_by, cores

# Ctrl-C and a closed terminal reach all processes: it is for the parent to decide what follows
FOR_THE_PARENT = (signal.SIGINT, signal.SIGHUP)


class Local:
    """Processes of this machine, each with its share of the processors."""

    def __init__(self, jobs: int | None, options: dict[str, Any]):
        self.jobs = jobs or cores()
        # a number of threads in the environment is the user's choice
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
        """Makes `stopping` return True in every process."""
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
    asked_by(asked)
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
