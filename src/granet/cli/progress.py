"""What a user sees while a network trains: a live bar on a terminal, a line an evaluation elsewhere."""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TextIO

from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from granet.cli.terminal import Console
from granet.train.trainer import Trainer


def shorten(name: str, width: int) -> str:
    """Returns a name in at most `width` characters, without its middle: runs differ in the ends of their names.

    >>> shorten("digits-ticket-9bf84d-ticket-0ep-global-1of3-53.58-724aaf", 24)
    'digits-ti…3-53.58-724aaf'
    """
    if len(name) <= width:
        return name
    tail = (width - 1) // 2 + (width - 1) // 6
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


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
        self._task = self._bar.add_task(self._description(), total=None, numbers="")
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def __call__(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Takes a record, and shows what has changed."""
        self._last[record["kind"]] = record
        if self.console.is_terminal:
            progress = {"total": trainer.end, "completed": trainer.step}
            self._bar.update(self._task, description=self._description(), numbers=self._numbers(), **progress)
        elif record["kind"] == "eval" and (time.monotonic() - self._shown > 2 or trainer.step == trainer.end):
            self._shown = time.monotonic()
            self.console.print(
                f"{self.title}  step {trainer.step}/{trainer.end}  epoch {record['epoch']:.1f}  {self._numbers()}",
                highlight=False,
                soft_wrap=True,
            )

    def _description(self) -> str:
        """Returns the title, cut so that there is room for the numbers."""
        return shorten(self.title, max(20, 2 * self.console.width // 5))

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
    """Gives a function that says whether the user wants to stop.

    Ctrl-C, SIGTERM or SIGHUP (a terminal that is closed) once asks, twice breaks off; a signal that is ignored, as
    `nohup` has it, stays so. A reader of the output that has gone away, `head` say, asks as well, and what is printed
    from then on goes nowhere.
    """
    asked = []
    out = sys.stdout

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for one in before:
            signal.signal(one, before[one])

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, ask)
    sys.stdout = Output(out, lambda: asked.append(signal.SIGPIPE))
    try:
        yield lambda: bool(asked)
    finally:
        sys.stdout = out
        for number, handler in before.items():
            signal.signal(number, handler)


class Output:
    """A text file whose reader may go away. Then `gone` is called once, and later writes are dropped."""

    def __init__(self, file: TextIO, gone: Callable[[], None]):
        self._file, self._gone = file, gone

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Writes text; returns the number of characters."""
        with self._surviving():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Sends what is written to the reader, if there still is one."""
        with self._surviving():
            self._file.flush()

    @contextmanager
    def _surviving(self):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that is closed
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
            self._gone()


def show_log(console: Console) -> None:
    """Shows the library's log messages on the console."""
    logger = logging.getLogger("granet")
    logger.setLevel(logging.INFO)
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False, show_level=False)]
