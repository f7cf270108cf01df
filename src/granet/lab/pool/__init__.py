"""Calls of one function with many arguments, spread over processes, a Ray cluster or a Slurm cluster.

A job is a top-level function and plain data, so that it can run anywhere. On this machine each process takes one job
after the other. A job that fails takes its process with it, whatever the cause, and the others go on.

>>> import math
>>> from granet.lab import pool
>>> sorted(outcome.value for outcome in pool.map(math.sqrt, [(4.0,), (9.0,)], jobs=1))
[2.0, 3.0]
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from typing import Any

from granet.lab.pool.executor import Executor as Executor
from granet.lab.pool.executor import Outcome as Outcome
from granet.lab.pool.executor import cores as cores
from granet.lab.pool.executor import stopping as stopping
from granet.lab.pool.local import Local
from granet.train.recipe import suggest


def check(executor: str, jobs: int | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Checks the arguments of `map` without starting anything.

    Raises:
        ValueError: there is no such executor, it has no such options, or `jobs` is below 1.
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
        jobs: how many run at a time; None means one per processor here, and all at once on a cluster.
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
