"""Schedules reach their ends exactly, whatever the grid."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granet.schedule import RAMPS, Constant, Cosine, Cubic, Every, Sigmoid, ramp

STEPS = st.integers(0, 10_000)


@given(st.integers(1, 500), STEPS, STEPS)
def test_every_lands_on_its_end(interval, begin, length):
    end = begin + length
    every = Every(interval, begin, end, land=True)
    hits = [step for step in range(begin + length + 2 * interval) if every(step)]
    assert hits == sorted({*range(begin, end + 1, interval), end} - {0})


@given(st.integers(1, 500), STEPS, STEPS, st.booleans())
def test_the_last_hit_is_the_last(interval, begin, length, land):
    every = Every(interval, begin, begin + length, land=land)
    assert every.last == max((step for step in range(begin + length + interval) if every(step)), default=0)
    assert Every(interval, begin + 1, begin).last == 0


def test_every_without_an_end_goes_on():
    assert [step for step in range(100) if Every(25)(step)] == [25, 50, 75]


@given(st.floats(0, 1), st.floats(0, 1), STEPS, STEPS, st.integers(-5, 20_000))
def test_ramps_stay_between_their_ends_and_meet_them(initial, final, begin, length, step):
    for make in RAMPS.values():
        values = make(initial, final, begin, begin + length)
        low, high = sorted((initial, final))
        assert low - 1e-12 <= values(step) <= high + 1e-12
        assert values(begin + length) == final
        assert values(begin + length + step + 5) == final
        if length:
            assert values(begin) == pytest.approx(initial)


def test_cubic_is_the_equation_of_zhu_and_gupta():
    for t in range(0, 1001, 50):
        assert Cubic(0.5, 0.9, 0, 1000)(t) == pytest.approx(0.9 + (0.5 - 0.9) * (1 - t / 1000) ** 3)


def test_every_ramp_has_its_own_form():
    """Half way and a quarter of the way up, by hand."""
    quarter = {name: make(0.0, 1.0, 100, 200)(125) for name, make in RAMPS.items()}
    assert quarter["cubic"] == pytest.approx(1 - 0.75**3)
    assert quarter["linear"] == pytest.approx(0.25)
    assert quarter["cosine"] == pytest.approx((1 - 2**-0.5) / 2)
    low, high, here = (1 / (1 + math.exp(-z)) for z in (-6.0, 6.0, -3.0))
    assert quarter["sigmoid"] == pytest.approx((here - low) / (high - low))
    for name in ("linear", "cosine", "sigmoid"):
        assert RAMPS[name](0.2, 0.8, 0, 50)(25) == pytest.approx(0.5)


def test_a_steeper_sigmoid_is_steeper():
    assert Sigmoid(0, 1, 0, 100, steepness=12)(25) < Sigmoid(0, 1, 0, 100)(25) < 0.25


def test_an_unknown_ramp_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown schedule 'sigmiod': .* did you mean 'sigmoid'"):
        ramp("sigmiod")


@pytest.mark.parametrize(("epoch", "r"), [(0, 0.5), (80, 0.2525), (160, 0.005)])
def test_cosine_has_the_values_of_the_official_schedule(epoch, r):
    assert Cosine(0.5, total=160 * 352, final=0.005)(epoch * 352) == pytest.approx(r)


def test_the_official_cifar_grid():
    """45,000 images in batches of 128, t_f at 80 epochs: 28 updates with pruning, 56 in all (see the method's card)."""
    steps = range(1, 160 * 352 + 1)
    assert sum(Every(1000, 0, 80 * 352)(step) for step in steps) == 28
    assert sum(Every(1000)(step) for step in steps) == 56


def test_constant():
    assert Constant(0.3)(0) == Constant(0.3)(99) == 0.3
