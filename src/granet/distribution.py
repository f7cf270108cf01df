"""Distributions: how one density becomes a whole number of active weights for every layer.

This is the only place that rounds. Each function takes `shapes`, a dict of parameter name to weight shape, and a
density in (0, 1], and returns a dict of name to budget, an integer. The budgets add up to `budget(N, density)` exactly,
none exceeds its layer, and none is zero.
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from math import floor, prod

Shapes = Mapping[str, Sequence[int]]


def budget(total: int, density: float) -> int:
    """The number of active weights that `density` means among `total`: rounded to nearest, half up.

    The density is read as the decimal number that it prints as, so that 0.35 of 10 is 4, not 3.

    >>> budget(10, 0.35), budget(25_502_912, 0.1)
    (4, 2550291)
    """
    return floor(Fraction(repr(round(density, 12))) * total + Fraction(1, 2))


def uniform(shapes: Shapes, density: float) -> dict[str, int]:
    """Budgets of the same density in every layer.

    >>> uniform({"a": (10, 10), "b": (3, 5)}, 0.2)
    {'a': 20, 'b': 3}
    """
    return _allocate(shapes, density, lambda shape: 1.0)


def er(shapes: Shapes, density: float) -> dict[str, int]:
    """Budgets whose densities are proportional to `(n_in + n_out) / (n_in * n_out)` (SET, Mocanu et al. 2018, Eq. 3).

    A convolution's kernel size does not count; see `erk`.

    >>> er({"a": (10, 10), "b": (100, 10)}, 0.2)
    {'a': 34, 'b': 186}
    """
    return _allocate(shapes, density, lambda shape: sum(shape[:2]) / prod(shape[:2]))


def erk(shapes: Shapes, density: float) -> dict[str, int]:
    """Budgets whose densities are proportional to `sum(shape) / prod(shape)` (RigL, Evci et al. 2020, section 3).

    Layers that would need more weights than they have become dense, and the others share what is left.

    >>> erk({"a": (16, 3, 3, 3), "b": (64, 64, 3, 3)}, 0.1)
    {'a': 432, 'b': 3298}
    """
    return _allocate(shapes, density, lambda shape: sum(shape) / prod(shape))


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, int]]] = {"uniform": uniform, "er": er, "erk": erk}


def named(name: str) -> Callable[[Shapes, float], dict[str, int]]:
    """The distribution called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in DISTRIBUTIONS:
        near = get_close_matches(name, DISTRIBUTIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown distribution {name!r}: choose from {', '.join(DISTRIBUTIONS)}{hint}")
    return DISTRIBUTIONS[name]


def scale(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """`counts` shrunk by one common factor so that they add up to `total`, none below 1.

    >>> scale({"a": 50, "b": 30, "c": 20}, 10)
    {'a': 5, 'b': 3, 'c': 2}
    """
    factor = total / max(1, sum(counts.values()))
    return _round({name: count * factor for name, count in counts.items()}, counts, total)


def _allocate(shapes: Shapes, density: float, weight: Callable[[Sequence[int]], float]) -> dict[str, int]:
    """Budgets with layer densities proportional to `weight(shape)`, capped at 1, the excess shared by the others."""
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is outside (0, 1]")
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total = budget(sum(sizes.values()), density)
    raw = {name: weight(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        rest = total - sum(sizes[name] for name in dense)
        room = sum(raw[name] * sizes[name] for name in sizes if name not in dense)
        epsilon = rest / room if room else 0.0
        full = {name for name in sizes if name not in dense and epsilon * raw[name] >= 1}
        if not full:
            break
        dense |= full
    ideal = {name: float(n) if name in dense else epsilon * raw[name] * n for name, n in sizes.items()}
    return _round(ideal, sizes, total)


def _round(ideal: Mapping[str, float], most: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers near `ideal` that add up to `total`, each from 1 to `most` (largest remainders first)."""
    if total < len(ideal):
        raise ValueError(
            f"{total} active weights cannot give each of {len(ideal)} layers at least one: "
            f"lower the sparsity, or leave small layers dense with skip="
        )
    counts = {name: min(most[name], max(1, floor(value))) for name, value in ideal.items()}
    # the layer furthest below its ideal gains first, the one furthest above loses first, names in order for ties
    while missing := total - sum(counts.values()):
        up = missing > 0
        open_ = [name for name in counts if (counts[name] < most[name] if up else counts[name] > 1)]
        open_.sort(key=lambda name: counts[name] - ideal[name], reverse=not up)
        for name in open_[: abs(missing)]:
            counts[name] += 1 if up else -1
    return counts
