"""Numbers in few bytes: the exponent of each in Huffman's code, its other bits as they are.

The magnitudes of a layer's weights lie within a few powers of two, so that few exponents occur; signs and fractions
look random. The bits of a number are rotated by one, which puts the sign last and the exponent of float32 and bfloat16
into a byte of its own, the top one. The code is that of zlib (RFC 1951), which looks for runs at most: they help where
nearly all exponents are equal.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def split(numbers: NDArray) -> tuple[Bytes, Bytes]:
    """Returns the top byte of each number after the rotation, and a row of its other bytes, the lowest first.

    >>> split(np.array([1.0, -1.5], dtype=np.float32))
    (array([127, 127], dtype=uint8), array([[  0,   0,   0],
           [  1,   0, 128]], dtype=uint8))
    """
    bits = 8 * numbers.dtype.itemsize
    raw = numbers.view(f"u{bits // 8}")
    rows = ((raw << 1) | (raw >> (bits - 1))).view(np.uint8).reshape(-1, bits // 8)
    return np.ascontiguousarray(rows[:, -1]), np.ascontiguousarray(rows[:, :-1])


def joined(top: Bytes, rest: Bytes) -> Bytes:
    """Returns the bytes of the numbers that `split` took apart."""
    rows = np.concatenate([rest, top[:, None]], axis=1)
    bits = 8 * rows.shape[1]
    raw = rows.reshape(-1).view(f"u{bits // 8}")
    return ((raw >> 1) | (raw << (bits - 1))).view(np.uint8)


def coded(top: Bytes) -> Bytes:
    """Returns the code of bytes.

    >>> top = np.array([62, 190, 61, 62] * 1000, dtype=np.uint8)
    >>> len(top), len(coded(top)) < 1000, np.array_equal(decoded(coded(top), 4000), top)
    (4000, True, True)
    """
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
        code = zlib.compressobj(strategy=strategy)
        found.append(code.compress(top.tobytes()) + code.flush())
    return np.frombuffer(bytearray(min(found, key=len)), dtype=np.uint8)


def decoded(code: Bytes, count: int) -> Bytes:
    """Returns the bytes that a code stands for; never more are made than one beyond `count`.

    Raises:
        ValueError: it is no code, or one of more or fewer bytes.
    """
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(code.tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"the code of its values' exponents is damaged ({error})") from None
    if len(found) != count or not reader.eof or reader.unused_data:
        more = "more or " if len(found) > count else ""
        raise ValueError(f"the code of its values' exponents has {more}other than {count:,} of them, or does not end")
    return np.frombuffer(found, dtype=np.uint8)


def entropy(counts: Sequence[int] | NDArray) -> float:
    """Returns the entropy of so many occurrences of each symbol at random places, all together, in bits.

    >>> round(entropy([100, 900]) / 1000, 3), entropy([0, 8]), entropy([500, 500])
    (0.469, 0.0, 1000.0)
    """
    found = np.asarray(counts, dtype=np.float64)
    found = found[found > 0]
    return float((found * np.log2(found.sum() / found)).sum()) if found.size else 0.0
