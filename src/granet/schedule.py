"""Schedules: frozen values that turn an optimizer step into a number, or into yes or no.

Steps count from 1: step 1 is the first optimizer step that was taken.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, exp, pi

from granet.names import unknown


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

    @property
    def last(self) -> int:
        """The last step that it says yes to, 0 if there is none; it must have an `end`."""
        if self.land or self.end < self.begin:
            return self.end if self.land else 0
        return self.begin + (self.end - self.begin) // self.interval * self.interval


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
class Sigmoid:
    """An S from `initial` at `begin` to `final` at `end`: slow, steep, slow again (CHTss, Zhang et al. 2025).

    With `x` the share of the way from `begin` to `end` and `sigma` the logistic function,
    `s_t = s_i + (s_f - s_i) * (S(x) - S(0)) / (S(1) - S(0))` where `S(x) = sigma(k * (2x - 1))`. The division, as in
    the authors' code, makes it meet both ends: the bare logistic of k = 6 would miss each by a quarter of a per cent.

    >>> [round(Sigmoid(0.5, 0.9, begin=0, end=100)(step), 4) for step in (0, 25, 50, 75, 100, 200)]
    [0.5, 0.5181, 0.7, 0.8819, 0.9, 0.9]
    """

    initial: float
    final: float
    begin: int
    end: int
    steepness: float = 6.0  # k

    def __call__(self, step: int) -> float:
        x = _progress(step, self.begin, self.end)
        if x == 1.0:
            return self.final
        first = self._logistic(0.0)
        share = (self._logistic(x) - first) / (self._logistic(1.0) - first)
        return self.initial + (self.final - self.initial) * share

    def _logistic(self, x: float) -> float:
        return 1 / (1 + exp(-self.steepness * (2 * x - 1)))


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


@dataclass(frozen=True)
class Waves:
    """From `initial` to `peak` and back, `cycles` times until `end`, and `initial` afterwards.

    A wave is a full `"cosine"`, or `"triangular"`: up and down along straight lines.

    >>> [round(Waves(0.99, 0.97, end=100, cycles=2)(step), 4) for step in (0, 10, 25, 50, 75, 100, 200)]
    [0.99, 0.9831, 0.97, 0.99, 0.97, 0.99, 0.99]

    Raises:
        ValueError: `cycles` is no whole number above 0, or the wave is unknown.
    """

    initial: float
    peak: float
    end: int
    cycles: int
    wave: str = "cosine"

    def __post_init__(self):
        if isinstance(self.cycles, bool) or not isinstance(self.cycles, int) or self.cycles < 1:
            raise ValueError(f"cycles={self.cycles!r} must be a whole number of cycles, 1 or more")
        if self.wave not in ("cosine", "triangular"):
            raise ValueError(unknown("wave", self.wave, ("cosine", "triangular")))

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.initial
        x = step * self.cycles % self.end / self.end  # the place in the cycle, from 0 to 1
        rise = (1 - cos(2 * pi * x)) / 2 if self.wave == "cosine" else 1 - abs(1 - 2 * x)
        return self.initial + (self.peak - self.initial) * rise


def _half_cosine(initial: float, final: float, begin: int, end: int) -> Callable[[int], float]:
    return lambda step: Cosine(initial, end - begin, final)(step - begin)


Ramp = Callable[[float, float, int, int], Callable[[int], float]]
RAMPS: dict[str, Ramp] = {"cubic": Cubic, "linear": Linear, "cosine": _half_cosine, "sigmoid": Sigmoid}


def ramp(name: str) -> Ramp:
    """The schedule called `name`, a function of `(initial, final, begin, end)`.

    >>> round(ramp("linear")(0.0, 0.8, 0, 100)(25), 4), round(ramp("cosine")(0.0, 0.8, 100, 200)(150), 4)
    (0.2, 0.4)

    Raises:
        ValueError: if the name is unknown; the message lists the known ones.
    """
    if name not in RAMPS:
        raise ValueError(unknown("schedule", name, RAMPS))
    return RAMPS[name]


def _progress(step: int, begin: int, end: int) -> float:
    """How far `step` is from `begin` to `end`, from 0 to 1; all the way once `end` is reached, also if end == begin."""
    if step >= end:
        return 1.0
    return (step - begin) / (end - begin) if step > begin else 0.0
