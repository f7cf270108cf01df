"""What a user sees while a network trains: a live bar on a terminal, a line an evaluation elsewhere."""

import logging
import signal
import time
from contextlib import contextmanager
from typing import Any

from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from granet.cli.terminal import Console
from granet.trainer import Trainer


class Watcher:
    """Shows the records of one run; use it as a context."""

    def __init__(self, title: str, console: Console):
        self.console = console
        self.title = title
        self._last: dict[str, dict[str, Any]] = {}
        self._shown = 0.0
        self._task = None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> "Watcher":
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=None, numbers="")
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Takes a record, and shows what has changed."""
        self._last[record["kind"]] = record
        if self.console.is_terminal:
            self._bar.update(
                self._task, description=self.title, total=trainer.steps, completed=trainer.step, numbers=self._numbers()
            )
        elif record["kind"] == "eval" and (time.monotonic() - self._shown > 2 or trainer.step == trainer.steps):
            self._shown = time.monotonic()
            self.console.print(
                f"{self.title}  step {trainer.step}/{trainer.steps}  epoch {record['epoch']:.1f}  {self._numbers()}",
                highlight=False,
                soft_wrap=True,
            )

    def _numbers(self) -> str:
        train, evaluation = self._last.get("train"), self._last.get("eval")
        parts = []
        if train:
            parts += [f"loss {train['loss']:.3f}", f"sparsity {train['sparsity']:.1%}"]
        if evaluation:
            parts.append(f"validation {evaluation['accuracy']:.2%}")
        return "  ".join(parts)


@contextmanager
def stoppable():
    """Gives a function that says whether the user wants to stop: Ctrl-C or SIGTERM once asks, twice breaks off."""
    asked = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for one in before:
            signal.signal(one, before[one])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_log(console: Console) -> None:
    """Shows the library's log messages on the console."""
    logger = logging.getLogger("granet")
    logger.setLevel(logging.INFO)
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False, show_level=False)]
