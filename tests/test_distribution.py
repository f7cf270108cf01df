"""Budgets are whole, add up exactly, and follow the definitions of ER and ERK."""

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granet import distribution
from granet.distribution import DISTRIBUTIONS, budget, er, erk, named, scale, share, uniform
from granet.train.models import MODELS

SHAPES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(
        st.tuples(st.integers(1, 80), st.integers(1, 80)),
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3), st.just(3)),
        st.tuples(st.integers(1, 20), st.just(1), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=8,
)


def weights_of(name, classes=10):
    model = MODELS[name](classes=classes, in_channels=3)
    return {key: tuple(p.shape) for key, p in model.named_parameters() if p.ndim in (2, 4)}


def naive_erk(shapes, density, power=1.0):
    """The iterative definition, as it is usually told: layers whose probability exceeds one become dense, and again."""
    dense = set()
    while True:
        divisor = sum(prod(s) * (sum(s) / prod(s)) ** power for name, s in shapes.items() if name not in dense)
        rhs = density * sum(map(prod, shapes.values())) - sum(prod(shapes[name]) for name in dense)
        epsilon = rhs / divisor
        too_much = {n for n, s in shapes.items() if n not in dense and epsilon * (sum(s) / prod(s)) ** power > 1}
        if not too_much:
            return {n: 1.0 if n in dense else epsilon * (sum(s) / prod(s)) ** power for n, s in shapes.items()}
        dense |= too_much


@given(SHAPES, st.floats(0.001, 1.0), st.sampled_from(sorted(DISTRIBUTIONS)))
def test_budgets_are_exact_or_refused(shapes, density, name):
    total = budget(sum(map(prod, shapes.values())), density)
    if total < len(shapes):
        with pytest.raises(ValueError, match="at least one"):
            named(name)(shapes, density)
        return
    counts = named(name)(shapes, density)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == total
    assert all(1 <= counts[key] <= prod(shape) for key, shape in shapes.items())
    assert all(type(value) is int for value in counts.values())


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("model", ["resnet20", "vgg19", "resnet50-cifar"])
def test_erk_agrees_with_its_iterative_definition(model, density):
    shapes = weights_of(model)
    counts, expected = erk(shapes, density), naive_erk(shapes, density)
    for name, shape in shapes.items():
        assert counts[name] == pytest.approx(expected[name] * prod(shape), abs=1.01)


def test_er_ignores_the_kernel():
    counts = er({"a": (64, 32, 1, 1), "b": (64, 32, 5, 5)}, 0.1)
    assert counts["b"] / counts["a"] == pytest.approx(25, rel=0.01)


def test_uniform_gives_every_layer_the_same_density():
    shapes = weights_of("vgg19")
    assert all(count == pytest.approx(0.1 * prod(shapes[n]), abs=1) for n, count in uniform(shapes, 0.1).items())


@pytest.mark.parametrize(
    ("total", "density", "expected"),
    [(10, 0.05, 1), (10, 0.35, 4), (3, 1 - 0.9, 0), (10, 1 - 0.9, 1), (200_000_000, 0.02, 4_000_000), (7, 1.0, 7)],
)
def test_budget_rounds_half_up_and_reads_the_density_as_it_prints(total, density, expected):
    assert budget(total, density) == expected


@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 500), min_size=1), st.data())
def test_scale_is_exact(counts, data):
    total = data.draw(st.integers(len(counts), sum(counts.values())))
    scaled = scale(counts, total)
    assert sum(scaled.values()) == total
    assert all(1 <= scaled[name] <= counts[name] for name in counts)


def test_unknown_distribution_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown distribution 'erq'.*did you mean 'er"):
        named("erq")


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_a_density_that_means_nothing_is_refused(density):
    with pytest.raises(ValueError, match="outside"):
        distribution.uniform({"a": (3, 3)}, density)


@pytest.mark.parametrize(
    ("shape", "n", "says"),
    [
        ((30, 20), 29, "29 active weights are less than one for each of the 30 neurons of 'a'.*skip="),
        ((30,), 30, "'a' of shape \\(30,\\) has one dimension"),
        (distribution.Limited((30, 20), Fraction(1, 2)), 60, "obeys a pattern"),
    ],
)
def test_a_constant_fan_in_that_cannot_be_is_refused(shape, n, says):
    with pytest.raises(ValueError, match=says):
        distribution.fan_ins({"a": shape}, {"a": n})


LAYERS = st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), st.integers(0, 500)), min_size=1, max_size=8)


@given(LAYERS, st.floats(0, 1))
def test_shares_are_exact_and_within_the_room(layers, part):
    weights, room = ({str(i): layer[k] for i, layer in enumerate(layers)} for k in (0, 1))
    total = int(part * sum(room.values()))
    got = share(total, weights, room)
    assert list(got) == list(room) and sum(got.values()) == total
    assert all(0 <= got[name] <= room[name] for name in room)
    # a layer that is not full has its part of what the layers with room share, up to rounding
    free = [name for name in room if got[name] < room[name]]
    left, heavy = sum(got[name] for name in free), sum(weights[name] for name in free)
    for name in free:
        ideal = left * weights[name] / heavy if heavy else left * room[name] / sum(room[n] for n in free)
        assert abs(got[name] - ideal) <= len(layers) + 1


def test_shares_refuse_more_than_the_room():
    with pytest.raises(ValueError, match="8 weights are more than the room for 7"):
        share(8, {"a": 1.0, "b": 2.0}, {"a": 3, "b": 4})


def test_more_than_there_is_room_for_is_refused():
    with pytest.raises(ValueError, match="10 active weights are more than the 5 that there is room for"):
        scale({"a": 5}, 10)


@given(SHAPES, st.floats(0.05, 1), st.data())
def test_densities_by_layer_are_exact_and_in_proportion(shapes, density, data):
    parts = {name: data.draw(st.floats(0.01, 1).map(lambda x: round(x, 6)), label=name) for name in shapes}
    total = budget(sum(map(prod, shapes.values())), density)
    if total < len(shapes):
        return
    counts = named(", ".join(f"{name}={part}" for name, part in parts.items()))(shapes, density)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= prod(shapes[name]) for name in shapes)
    # of layers that are neither full nor at the least, a larger part means a larger density, up to rounding
    free = [name for name in shapes if 1 < counts[name] < prod(shapes[name])]
    for a in free:
        for b in free:
            scaled = counts[a] / parts[a] / prod(shapes[a]) * parts[b] * prod(shapes[b])
            assert abs(counts[b] - scaled) <= len(shapes) * (1 + scaled / counts[a])


def test_the_first_pattern_that_fits_a_layer_counts():
    shapes = {"conv1.weight": (10, 10), "conv2.weight": (10, 10), "fc.weight": (10, 10)}
    assert named("conv1.*=0.2, *=0.1")(shapes, 0.4) == {"conv1.weight": 60, "conv2.weight": 30, "fc.weight": 30}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a=0", "a=0 in a distribution: write NAME=DENSITY, a density above 0 and at most 1"),
        ("a=2", "above 0 and at most 1"),
        ("a=x", "a=x in a distribution"),
        ("=0.5", "write NAME=DENSITY"),
        ("a=nan", "a=nan in a distribution"),
    ],
)
def test_a_list_of_densities_that_means_nothing_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        named(text)


def test_layers_without_a_density_and_densities_without_a_layer_are_refused():
    shapes = {"a": (10, 10), "b": (10, 10)}
    with pytest.raises(ValueError, match=r"has no density for b: add it, or \*=DENSITY at the end"):
        named("a=0.5")(shapes, 0.5)
    with pytest.raises(ValueError, match="names c, which decides nothing: the sparse layers are a, b"):
        named("a=0.5, b=0.1, c=0.2")(shapes, 0.5)
    with pytest.raises(ValueError, match="names a, which decides nothing"):
        named("*=0.5, a=0.1")(shapes, 0.5)
