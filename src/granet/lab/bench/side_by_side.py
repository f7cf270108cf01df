"""Engines side by side: prepared, compared with torch in float32, and only then timed, in turns."""

from __future__ import annotations

import datetime
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from granet.engine.calibration import PIECES
from granet.engine.quantise import relative_error
from granet.engine.search import difference
from granet.lab.bench.engines import (
    ENGINES,
    PRECISIONS,
    Arguments,
    Prepared,
    Run,
    Unable,
    Work,
    calibration_of,
    prepare,
)
from granet.lab.bench.layers import Layers, measure
from granet.lab.bench.measuring import latencies, throughput
from granet.lab.bench.results import Row, SideBySide
from granet.lab.sources import Source
from granet.names import unknown
from granet.pattern import parse

log = logging.getLogger(__name__)

BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.25}  # the largest error; see `error_of`
REFERENCE = ("torch", "float32")


@dataclass(frozen=True)
class Settings:
    """How engines are measured.

    Attributes:
        engines: their names in `ENGINES`; those that are usual if empty.
        precisions: among `PRECISIONS`.
        threads: threads for all streams together; as many as torch has if None.
        streams: sessions that run at the same time, for the throughput.
        seconds: how long all engines take turns.
        images: test images of a run for the accuracy; 0 for none.
        cpu_time: measure processor time, for one thread on a busy machine.
        layers: measure the layers of granet's fastest compiled network, too.
        against: the pattern with which these are compared; empty for none.
    """

    engines: Sequence[str] = ()
    precisions: Sequence[str] = PRECISIONS
    threads: int | None = None
    streams: int = 1
    seconds: float = 3.0
    images: int = 500
    cpu_time: bool = False
    layers: bool = False
    against: str = ""

    def __post_init__(self) -> None:
        parse(self.against or None)
        for name in self.engines:
            if name not in (*ENGINES, "all"):
                raise ValueError(unknown("engine", name, [*ENGINES, "all"]))
        for name in self.precisions:
            if name not in PRECISIONS:
                raise ValueError(unknown("precision", name, PRECISIONS))
        for name, number in (("threads", self.threads), ("streams", self.streams)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds={self.seconds} must be a number above 0")
        if self.images < 0:
            raise ValueError(f"images={self.images} must be at least 0")
        if self.cpu_time and (self.threads or torch.get_num_threads()) > 1:
            raise ValueError("processor time tells the speed of one thread: add --threads 1")

    @property
    def chosen(self) -> list[tuple[str, str]]:
        """The engines and precisions to measure, the reference first."""
        names = [n for n, one in ENGINES.items() if n in self.engines or (one.usual if not self.engines else False)]
        names = list(ENGINES) if "all" in self.engines else names
        pairs = [(n, p) for n in names for p in PRECISIONS if p in self.precisions and p in ENGINES[n].precisions]
        return [REFERENCE, *(pair for pair in pairs if pair != REFERENCE)]


def side_by_side(source: Source, settings: Settings | None = None) -> tuple[SideBySide, dict[str, Prepared]]:
    """Returns the measurements of a model's engines, and what granet prepared at each precision.

    The outputs of every engine are compared with those of torch in float32 before any is timed; an engine that is off
    by more than `BOUNDS` is left out, like one that is not installed or cannot take the model.
    """
    settings = settings or Settings()
    batches = None
    if source.trainer is not None:
        wanted = PIECES * len(source.example[0])
        batches = [x.cpu() for x, _ in source.trainer.images.spread("train", wanted)]
    threads = settings.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), _threads(threads):
        work = Work(source.model, source.example, calibration_of(source.example, batches), Path(folder))
        ready: dict[tuple[str, str], tuple[Prepared, Run, float]] = {}
        left_out = []
        expected = None
        for name, precision in settings.chosen:
            log.info("preparing %s in %s", name, precision)
            try:
                made = prepare(ENGINES[name], precision, work)
                run, outputs = _opened(made, threads, work.example)
                expected = expected if expected is not None else outputs
                ready[name, precision] = made, run, _checked(expected, outputs, precision)
            except Unable as reason:
                if (name, precision) == REFERENCE:
                    raise ValueError(f"torch cannot run {source.name}: {reason}") from reason
                left_out.append((name, precision, str(reason)))
        log.info("measuring %d engines in turns for %g s", len(ready), settings.seconds)
        times = latencies(
            {f"{n} {p}": partial(run, work.example) for (n, p), (_, run, _) in ready.items()},
            seconds=settings.seconds,
            clock=time.process_time if settings.cpu_time else time.perf_counter,
        )
        images = _test_images(source, settings.images)
        examples, rows = len(work.example[0]), []
        for (name, precision), (made, run, error) in ready.items():
            latency = times[f"{name} {precision}"]
            rate = 1e3 * examples / latency.p50
            if settings.streams > 1:
                share = settings.seconds / len(ready)
                rate = _rate(made, work.example, settings.streams, max(1, threads // settings.streams), share)
            sparse = made.report is not None and made.report.chosen == "sparse"
            accuracy = _accuracy(run, images) if images else None
            rows.append(Row(name, precision, sparse, latency, rate, made.nbytes, error, accuracy, made.note))
        layers = _layers(work, rows, ready, settings) if settings.layers else None
    found = SideBySide(
        name=source.name,
        about=_about(source, settings, batches),
        machine=_machine(threads, settings),
        rows=tuple(rows),
        left_out=tuple(left_out),
        images=sum(len(labels) for _, labels in images),
        streams=settings.streams,
        layers=layers,
    )
    return found, {precision: made for (name, precision), (made, _, _) in ready.items() if name == "granet"}


def _layers(work: Work, rows: Sequence[Row], ready: Mapping, settings: Settings) -> Layers | None:
    sparse = [row for row in rows if row.sparse]
    if not sparse:
        return None
    fastest = min(sparse, key=lambda row: row.latency.least)
    log.info("measuring the layers of %s", fastest)
    made, *_ = ready[fastest.engine, fastest.precision]
    return measure(work, made.report, settings.against)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _opened(made: Prepared, threads: int, example: Arguments) -> tuple[Run, list[Tensor]]:
    try:
        run = made.open(threads)
        return run, [one.clone() for one in run(example)]
    except Exception as error:  # of many kinds: each engine has its own
        raise Unable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error


def _checked(expected: list[Tensor], outputs: list[Tensor], precision: str) -> float:
    """Returns the error of outputs; raises `Unable` if they are off."""
    error = error_of(expected, outputs, precision)
    if not error <= BOUNDS[precision]:
        raise Unable(f"its outputs are off by {error:.1e}, and {BOUNDS[precision]:g} is allowed: not timed")
    return error


def error_of(expected: list[Tensor], outputs: list[Tensor], precision: str) -> float:
    """Returns the error of outputs: infinite if shapes differ.

    In float32 it is the largest difference relative to the largest value, at reduced precision the root mean square of
    the differences relative to that of the outputs.
    """
    if [one.shape for one in expected] != [one.shape for one in outputs]:
        return float("inf")
    outputs = [one.to(known.dtype) for one, known in zip(outputs, expected, strict=True)]
    return difference(expected, outputs) if precision == "float32" else relative_error(expected, outputs)


def _rate(made: Prepared, example: Arguments, streams: int, threads: int, seconds: float) -> float:
    with _threads(threads):
        calls: list[Callable[[], object]] = [partial(made.open(threads), example) for _ in range(streams)]
        return throughput(calls, examples=len(example[0]), seconds=seconds)


def _test_images(source: Source, count: int) -> list[tuple[Tensor, Tensor]]:
    """Returns test images in batches of the example's size, with their labels; what is left of a batch is not used."""
    if source.trainer is None or not count:
        return []
    size = len(source.example[0])
    images, labels = zip(*source.trainer.images.spread("test", count), strict=True)
    pieces = zip(torch.cat(images).cpu().split(size), torch.cat(labels).cpu().split(size), strict=True)
    return [(x, y) for x, y in pieces if len(x) == size]


def _accuracy(run: Run, images: list[tuple[Tensor, Tensor]]) -> float:
    correct = sum(int((run((x,))[0].argmax(dim=1) == y).sum()) for x, y in images)
    return correct / sum(len(y) for _, y in images)


def _about(source: Source, settings: Settings, batches: list[Tensor] | None) -> str:
    weights = [p for p in source.model.parameters() if p.dim() > 1]
    total = sum(p.numel() for p in weights)
    active = sum(int(p.count_nonzero()) for p in weights)
    shapes = " and ".join("x".join(map(str, one.shape)) for one in source.example)
    text = f"{1 - active / max(1, total):.1%} of {total:,} weights are zero, {source.about}; inputs {shapes}"
    if "int8" in settings.precisions:
        text += "; int8 is calibrated on " + ("training images" if batches else "the example inputs")
    return text


def _machine(threads: int, settings: Settings) -> str:
    parts = [
        processor(),
        f"{threads} thread{'s' * (threads > 1)}",
        f"{settings.streams} streams" if settings.streams > 1 else "",
        f"torch {torch.__version__}",
        "processor time" if settings.cpu_time else "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    ]
    return ", ".join(filter(None, parts))


def processor() -> str:
    """Returns the name of the processor."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
