"""Distributions: how one density becomes a whole number of active weights for every layer.

This is the only place that rounds. Each function takes `shapes`, a dict of parameter name to weight shape, and a
density in (0, 1], and returns a dict of name to budget, an integer. The budgets add up to `budget(N, density)` exactly,
none exceeds its layer, and none is zero.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from math import floor, prod

from granet.names import unknown

Shapes = Mapping[str, Sequence[int]]


class Limited(tuple):
    """A shape of which only a share `limit` of the entries may be active in the end, as under N:M sparsity."""

    limit: Fraction

    def __new__(cls, shape: Sequence[int], limit: Fraction):
        self = super().__new__(cls, shape)
        self.limit = limit
        return self


def capacity(shape: Sequence[int]) -> int:
    """The number of entries that may be active in the end: all of them, unless the shape is `Limited`."""
    return floor(prod(shape) * getattr(shape, "limit", 1))


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
    return proportional(shapes, density, dict.fromkeys(shapes, 1.0))


def er(shapes: Shapes, density: float) -> dict[str, int]:
    """Budgets whose densities are proportional to `(n_in + n_out) / (n_in * n_out)` (SET, Mocanu et al. 2018, Eq. 3).

    A convolution's kernel size does not count; see `erk`.

    >>> er({"a": (10, 10), "b": (100, 10)}, 0.2)
    {'a': 34, 'b': 186}
    """
    return proportional(shapes, density, {name: sum(shape[:2]) / prod(shape[:2]) for name, shape in shapes.items()})


def erk(shapes: Shapes, density: float) -> dict[str, int]:
    """Budgets whose densities are proportional to `sum(shape) / prod(shape)` (RigL, Evci et al. 2020, section 3).

    Layers that would need more weights than they have become dense, and the others share what is left.

    >>> erk({"a": (16, 3, 3, 3), "b": (64, 64, 3, 3)}, 0.1)
    {'a': 432, 'b': 3298}
    """
    return proportional(shapes, density, {name: sum(shape) / prod(shape) for name, shape in shapes.items()})


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, int]]] = {"uniform": uniform, "er": er, "erk": erk}


def named(name: str) -> Callable[[Shapes, float], dict[str, int]]:
    """The distribution called `name`, or the one of densities by layer that `name` lists.

    >>> named("conv*=0.5, fc=0.1")({"conv1": (10, 10), "conv2": (10, 10), "fc": (100, 10)}, 0.2)
    {'conv1': 60, 'conv2': 60, 'fc': 120}

    Raises:
        ValueError: if the name is unknown, with the known ones, or a density is impossible.
    """
    if "=" in name:
        return by_layer(name)
    if name not in DISTRIBUTIONS:
        raise ValueError(f'{unknown("distribution", name, DISTRIBUTIONS)}; or densities by layer: "conv1.*=0.5, *=0.1"')
    return DISTRIBUTIONS[name]


def by_layer(text: str) -> Callable[[Shapes, float], dict[str, int]]:
    """The distribution with layer densities in the proportions of a list such as `conv1.*=0.5, *=0.1`.

    The names are those of parameters, or patterns of them, and the first that fits counts. The densities are scaled by
    one factor, so that the budgets add up to what the sparsity of the whole network asks for.

    Raises:
        ValueError: if a density is not above 0 and at most 1. Also, when it is used, if the list has no density for a
            layer, or fits no layer with one of its names.
    """
    entries = [entry.strip().rpartition("=")[::2] for entry in text.split(",") if entry.strip()]
    densities: dict[str, float] = {}
    for pattern, number in entries:
        try:
            densities[pattern.strip()] = value = float(number)
        except ValueError:
            value = 0.0
        if not pattern.strip() or not 0 < value <= 1:
            raise ValueError(
                f"{pattern}={number} in a distribution: write NAME=DENSITY, a density above 0 and at most 1"
            )

    def budgets(shapes: Shapes, density: float) -> dict[str, int]:
        chosen = {name: next((p for p in densities if fnmatchcase(name, p)), None) for name in shapes}
        if left := [name for name, pattern in chosen.items() if pattern is None]:
            raise ValueError(
                f"the distribution has no density for {', '.join(left[:5])}: add it, or *=DENSITY at the end"
            )
        if idle := [pattern for pattern in densities if pattern not in chosen.values()]:
            raise ValueError(
                f"the distribution names {', '.join(idle[:5])}, which decides nothing: the sparse layers are "
                f"{', '.join(list(shapes)[:5])}{' and others' * (len(shapes) > 5)}, and the first name that fits counts"
            )
        return proportional(shapes, density, {name: densities[pattern] for name, pattern in chosen.items()})

    return budgets


def fan_ins(shapes: Shapes, budgets: Mapping[str, int]) -> dict[str, int]:
    """How many weights each neuron of a layer has if all have equally many, by layer: the budgets, rounded down.

    Neurons are counted by the first dimension: outputs of a linear layer, filters of a convolution.

    >>> fan_ins({"a": (10, 10), "b": (3, 2, 3, 3)}, {"a": 34, "b": 54})
    {'a': 3, 'b': 18}

    Raises:
        ValueError: a budget is less than a weight for each neuron, a parameter has one dimension, or a pattern limits
            the weights of a neuron.
    """
    found = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or isinstance(shape, Limited):
            raise ValueError(
                f"a constant fan-in counts the weights of each neuron, and {name!r} of shape {tuple(shape)} "
                + ("has one dimension" if len(shape) < 2 else "obeys a pattern that counts them in groups")
                + ": leave it dense with skip=, or choose pattern 'unstructured'"
            )
        found[name] = budgets[name] // shape[0]
        if not found[name]:
            raise ValueError(
                f"{budgets[name]} active weights are less than one for each of the {shape[0]} neurons of {name!r}: "
                f"lower the sparsity, or leave the layer dense with skip="
            )
    return found


def scale(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """`counts` shrunk by one common factor so that they add up to `total`, none below 1.

    >>> scale({"a": 50, "b": 30, "c": 20}, 10)
    {'a': 5, 'b': 3, 'c': 2}
    """
    factor = total / max(1, sum(counts.values()))
    return _round({name: count * factor for name, count in counts.items()}, counts, total)


def alike(total: int, shapes: Shapes, most: Mapping[str, int], at_least: Mapping[str, int]) -> dict[str, int]:
    """Budgets of one density that add up to `total`, but for layers that hold fewer weights or are to keep more.

    Args:
        total: the active weights of all layers together.
        shapes: the layers' shapes.
        most: how many each may have; what such a layer has no room for is shared by the others.
        at_least: how many some of them keep, as far as `most` allows; the others then get so many fewer.

    >>> shapes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}
    >>> alike(60, shapes, {"a": 100, "b": 10, "c": 100}, {"c": 40})
    {'a': 10, 'b': 10, 'c': 40}

    Raises:
        ValueError: what is to be kept leaves less than a weight for each of the others.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    counts = share(total, sizes, most, least=1)
    kept = {name: min(n, most[name]) for name, n in at_least.items() if min(n, most[name]) > counts[name]}
    if not kept:
        return counts
    rest, others = total - sum(kept.values()), [name for name in sizes if name not in kept]
    if rest < len(others):
        raise ValueError(
            f"{', '.join(kept)} keep {sum(kept.values())} of the {total} active weights, which leaves too few for the "
            f"other {len(others)} layers: lower the sparsity"
        )
    shared = share(rest, {name: sizes[name] for name in others}, {name: most[name] for name in others}, least=1)
    return {name: kept.get(name) or shared[name] for name in sizes}


def share(total: int, weights: Mapping[str, float], room: Mapping[str, int], *, least: int = 0) -> dict[str, int]:
    """Whole numbers that add up to `total`, in proportion to `weights`, from `least` to `room` each.

    What a layer has no room for is shared by the others, in proportion again; where all weights are zero, by room.

    >>> share(10, {"a": 6.0, "b": 3.0, "c": 1.0}, {"a": 3, "b": 9, "c": 9})
    {'a': 3, 'b': 5, 'c': 2}

    Raises:
        ValueError: `total` is more than all the room, or too few for `least` each.
    """
    if total > sum(room.values()):
        raise ValueError(f"{total} weights are more than the room for {sum(room.values())}")
    most = max(weights.values()) or 1.0
    return _fill(total, {name: weights[name] / most / max(1, n) for name, n in room.items()}, room, least)


def proportional(shapes: Shapes, density: float, weights: Mapping[str, float]) -> dict[str, int]:
    """Budgets with layer densities proportional to `weights`, capped at 1, the excess shared by the others.

    >>> proportional({"a": (10, 10), "b": (10, 10)}, 0.2, {"a": 3.0, "b": 1.0})
    {'a': 30, 'b': 10}

    Raises:
        ValueError: the density is outside (0, 1], or leaves a layer without any weight.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is outside (0, 1]")
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total, most = budget(sum(sizes.values()), density), {name: capacity(shape) for name, shape in shapes.items()}
    if total >= sum(most.values()):  # beyond the capacity of all layers, they are equally dense
        return _fill(total, dict.fromkeys(sizes, 1.0), sizes, least=1)
    return _fill(total, {name: weights[name] * (sizes[name] / most[name]) for name in shapes}, most, least=1)


def _fill(total: int, raw: Mapping[str, float], sizes: Mapping[str, int], least: int) -> dict[str, int]:
    """Parts of `sizes` that are proportional to `raw`, none above 1, as whole numbers that add up to `total`."""
    full: set[str] = set()
    while True:
        rest = total - sum(sizes[name] for name in full)
        room = sum(raw[name] * sizes[name] for name in sizes if name not in full)
        if not room and rest:
            raw = {**raw, **{name: 1.0 for name in sizes if name not in full}}
            room = sum(sizes[name] for name in sizes if name not in full)
        epsilon = rest / room if room else 0.0
        over = {name for name in sizes if name not in full and epsilon * raw[name] >= 1}
        if not over:
            break
        full |= over
    ideal = {name: float(n) if name in full else epsilon * raw[name] * n for name, n in sizes.items()}
    return _round(ideal, sizes, total, least)


def _round(ideal: Mapping[str, float], most: Mapping[str, int], total: int, least: int = 1) -> dict[str, int]:
    """Whole numbers near `ideal` that add up to `total`, each from `least` to `most` (largest remainders first)."""
    if total < least * len(ideal):
        raise ValueError(
            f"{total} active weights cannot give each of {len(ideal)} layers at least one: "
            f"lower the sparsity, or leave small layers dense with skip="
        )
    if total > sum(most.values()):
        raise ValueError(f"{total} active weights are more than the {sum(most.values())} that there is room for")
    counts = {name: min(most[name], max(least, floor(value))) for name, value in ideal.items()}
    # the layer furthest below its ideal gains first, the one furthest above loses first, names in order for ties
    while missing := total - sum(counts.values()):
        up = missing > 0
        open_ = [name for name in counts if (counts[name] < most[name] if up else counts[name] > least)]
        open_.sort(key=lambda name: counts[name] - ideal[name], reverse=not up)
        for name in open_[: abs(missing)]:
            counts[name] += 1 if up else -1
    return counts
