"""The code of exponents: it comes back, is near the entropy, and unpacks to no more than it may."""

import zlib

import numpy as np
import pytest
from hypothesis import given, strategies

from granet.storage import values


@given(strategies.binary(max_size=2000))
def test_bytes_come_back(content):
    top = np.frombuffer(content, dtype=np.uint8)
    assert np.array_equal(values.decoded(values.coded(top), top.size), top)


@given(strategies.binary(max_size=200), strategies.sampled_from([1, 2, 4, 8]))
def test_numbers_come_back(content, size):
    numbers = np.frombuffer(content[: len(content) // size * size], dtype=f"u{size}")
    assert np.array_equal(values.joined(*values.split(numbers)).view(numbers.dtype), numbers)


def test_the_exponents_of_weights_take_little_more_than_their_entropy():
    weights = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    top, _ = values.split(weights)
    assert np.array_equal(np.frexp(weights)[1] + 126, top)
    least = values.entropy(np.bincount(top)) / 8
    assert least < len(values.coded(top)) < 1.05 * least < 0.4 * top.size


def test_what_is_no_such_code_is_refused():
    code = values.coded(np.arange(200, dtype=np.uint8))
    bomb = np.frombuffer(zlib.compress(bytes(50_000_000)), dtype=np.uint8)
    for damaged, count in ((code, 199), (code, 201), (code[:-1], 200), (np.append(code, code), 200), (bomb, 200)):
        with pytest.raises(ValueError, match=f"has .*other than {count} of them, or does not end"):
            values.decoded(damaged, count)
    for damaged in (code[5:], code[::-1], code[:0]):
        with pytest.raises(ValueError, match="the code of its values' exponents"):
            values.decoded(np.ascontiguousarray(damaged), 200)
