"""Schedules: frozen values that turn an optimizer step into a number, or into yes or no.

Steps count from 1: step 1 is the first optimizer step that was taken.
"""

from dataclasses import dataclass
from math import cos, pi


@dataclass(frozen=True)
class Every:
    """Whether a step is on the grid `begin, begin + interval, begin + 2 * interval, ...` up to `end` included.

    With `land=True` the step `end` itself counts too, on the grid or not: the last update meets its target there.

    >>> [step for step in range(1, 100) if Every(20, begin=5, end=70, land=True)(step)]
    [5, 25, 45, 65, 70]
    """

    interval: int
    begin: int = 0
    end: int | None = None
    land: bool = False

    def __call__(self, step: int) -> bool:
        if step < 1 or step < self.begin or (self.end is not None and step > self.end):
            return False
        return (step - self.begin) % self.interval == 0 or (self.land and step == self.end)


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `initial` at `begin` to `final` at `end`, level before and after.

    >>> Linear(0.0, 0.8, begin=0, end=100)(50)
    0.4
    """

    initial: float
    final: float
    begin: int
    end: int

    def __call__(self, step: int) -> float:
        return self.final + (self.initial - self.final) * (1 - _progress(step, self.begin, self.end))


@dataclass(frozen=True)
class Cubic:
    """The gradual pruning schedule of Zhu & Gupta 2017, Eq. 1 (GraNet, Eq. 1): steep at first, level at the end.

    `s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (t_f - t_0)) ** 3`, level before `begin` and after `end`.

    >>> [round(Cubic(0.5, 0.9, begin=0, end=100)(step), 4) for step in (0, 50, 100, 200)]
    [0.5, 0.85, 0.9, 0.9]
    """

    initial: float
    final: float
    begin: int
    end: int

    def __call__(self, step: int) -> float:
        return self.final + (self.initial - self.final) * (1 - _progress(step, self.begin, self.end)) ** 3


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `initial` at step 0 down to `final` at `total`, level afterwards.

    >>> [round(Cosine(0.5, total=100, final=0.005)(step), 4) for step in (0, 50, 100)]
    [0.5, 0.2525, 0.005]
    """

    initial: float
    total: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return self.final + (self.initial - self.final) * (1 + cos(pi * _progress(step, 0, self.total))) / 2


def _progress(step: int, begin: int, end: int) -> float:
    """How far `step` is from `begin` to `end`, from 0 to 1; all the way once `end` is reached, also if end == begin."""
    if step >= end:
        return 1.0
    return (step - begin) / (end - begin) if step > begin else 0.0
