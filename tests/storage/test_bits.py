"""Codes of places: they come back, take no more than a mask, come close to the entropy, and are checked."""

import numpy as np
import pytest
from hypothesis import given, strategies

from granet.storage import bits
from granet.storage.values import entropy

MASKS = strategies.builds(
    lambda size, density, seed: np.random.default_rng(seed).random(size) < density,
    strategies.integers(0, 3000),
    strategies.sampled_from([0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 1]),
    strategies.integers(0, 2**32 - 1),
)


def code(mask, low):
    empty = np.empty((0, 0), dtype=np.uint8)
    return bits.unary_code(mask, low), bits.planes(mask, low) if low else empty, mask.size, int(mask.sum())


@given(MASKS, strategies.integers(0, 12))
def test_places_come_back(mask, low):
    found = code(mask, low)
    bits.verify(*found)
    again = np.zeros(mask.size, dtype=bool)
    again[bits.places(*found)] = True
    assert np.array_equal(again, mask)


@given(MASKS)
def test_the_code_that_is_chosen_has_the_size_that_was_said_and_is_no_larger_than_a_mask(mask):
    low, unary = bits.cheapest(mask)
    found = code(mask, low)
    assert found[0].nbytes == unary
    assert found[0].nbytes + found[1].nbytes <= -(-mask.size // 8)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2])
def test_random_places_take_little_more_than_their_entropy(density):
    mask = np.random.default_rng(0).random(1_000_000) < density
    unary, planes, size, active = code(mask, bits.cheapest(mask)[0])
    assert 8 * (unary.nbytes + planes.nbytes) < 1.04 * entropy([active, size - active])


@given(MASKS, strategies.integers(0, 8), strategies.data())
def test_a_flipped_bit_is_noticed_or_gives_places_within_the_tensor(mask, low, data):
    unary, planes, size, active = code(mask, low)
    damaged = data.draw(strategies.sampled_from([part for part in (unary, planes) if part.size] or [None]))
    if damaged is None:
        return
    at = data.draw(strategies.integers(0, damaged.size - 1))
    damaged.reshape(-1)[at] ^= 1 << data.draw(strategies.integers(0, 7))
    try:
        bits.verify(unary, planes, size, active)
    except ValueError:
        return
    again = np.zeros(size, dtype=bool)
    again[bits.places(unary, planes, size, active)] = True
    assert again.sum() == active


def test_what_is_impossible_is_said():
    mask = np.arange(100) % 10 == 9
    unary, planes, size, active = code(mask, 0)
    with pytest.raises(ValueError, match="10 bits of its mask are set, and there are 11 values"):
        bits.verify(unary, planes, size, 11)
    with pytest.raises(ValueError, match="the index of its last value is 99, and it has 90 entries"):
        bits.verify(unary, planes, 90, active)
    unary, planes, size, active = code(mask, 2)
    with pytest.raises(ValueError, match="the index of its last value is 99, and it has 90 entries"):
        bits.verify(unary, planes, 90, active)
