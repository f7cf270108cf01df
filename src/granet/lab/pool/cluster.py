"""Executors beyond this machine: Ray, and Slurm through submitit.

Both need granet installed where the jobs run, and the folder of runs on a file system that all machines share.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from granet.lab.pool.executor import MOMENT, TAIL, Outcome, cores

LOGS = "slurm"  # folder of the scripts and logs of Slurm jobs


class Ray:
    """Tasks of the Ray cluster that the environment's ``RAY_ADDRESS`` names, else of a Ray on this machine."""

    def __init__(self, jobs: int | None, options: dict[str, Any]):
        import ray

        self.jobs = jobs
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        share = max(1, cores() // jobs) if jobs else 1
        # a task that fails is for the sweep to report; Ray gives each task so many threads as it has processors
        self._options = {"num_cpus": share, "max_retries": 0} | options
        self._running: dict[Any, tuple] = {}

    def submit(self, function: Callable, arguments: list[tuple]) -> None:
        """Hands the tasks to Ray, which starts them where there is room."""
        try:
            task = self._ray.remote(function).options(**self._options)
        except ValueError as error:
            raise ValueError(f"Ray does not take these options: {error}") from None
        self._running |= {task.remote(*argument): argument for argument in arguments}

    def wait(self) -> list[Outcome]:
        """Returns what has ended."""
        done, _ = self._ray.wait(list(self._running), timeout=MOMENT)
        return [self._outcome(reference, self._running.pop(reference)) for reference in done]

    def _outcome(self, reference: Any, argument: tuple) -> Outcome:
        try:
            return Outcome(argument, self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            return Outcome(argument, error="\n".join(str(error).splitlines()[-TAIL:]))

    def stop(self) -> None:
        """Cancels the tasks; a run goes on from its last checkpoint."""
        for reference in self._running:
            self._ray.cancel(reference)

    def close(self) -> None:
        """Leaves Ray, and ends it if it was started here."""
        if self._mine:
            self._ray.shutdown()


class Slurm:
    """Jobs of a Slurm cluster, an array of those that are submitted at a time.

    Options are those of submitit's ``AutoExecutor.update_parameters``, and ``folder`` for scripts and logs and
    ``cluster``, which may also be ``local``: submitit's own processes on this machine, to try it out.
    """

    def __init__(self, jobs: int | None, options: dict[str, Any]):
        import submitit

        self.jobs = jobs
        folder, cluster = Path(options.pop("folder", LOGS)), options.pop("cluster", "slurm")
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{"name": "granet", "cpus_per_task": 1} | options)
        except (RuntimeError, ValueError, NameError) as error:
            raise ValueError(f"submitit cannot use cluster {cluster!r} with {options}: {error}") from None
        self._running: list[tuple[Any, tuple]] = []

    def submit(self, function: Callable, arguments: list[tuple]) -> None:
        """Submits the jobs; each that hits its time limit, or is preempted, is queued again and goes on."""
        job = Again(function)
        with self._executor.batch():
            handles = [self._executor.submit(job, *argument) for argument in arguments]
        self._running += zip(handles, arguments, strict=True)

    def wait(self) -> list[Outcome]:
        """Returns what has ended."""
        ended = [(job, argument) for job, argument in self._running if job.done()]
        if not ended:
            time.sleep(MOMENT)
        self._running = [pair for pair in self._running if pair not in ended]
        return [self._outcome(job, argument) for job, argument in ended]

    def _outcome(self, job: Any, argument: tuple) -> Outcome:
        error = job.exception()
        if error is not None:
            return Outcome(argument, error="\n".join(str(error).splitlines()[-TAIL:]))
        return Outcome(argument, job.result())

    def stop(self) -> None:
        """Cancels the jobs; a run goes on from its last checkpoint."""
        for job, _ in self._running:
            job.cancel()

    def close(self) -> None:
        """Cancels what still runs."""
        self.stop()


class Again:
    """A function that submitit queues again, with the same arguments, when its time is up: runs go on by themselves."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the function returns."""
        return self._function(*arguments)

    def checkpoint(self, *arguments: Any) -> Any:
        """Returns the job that submitit submits in its place."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)
