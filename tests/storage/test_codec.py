"""Single tensors: what is stored of them, and that it comes back bit for bit."""

import pytest
import torch

from granet.engine.precision import quantised_weight
from granet.storage import codec, container
from granet.storage.codec import Entry


def tensor(density, shape=(40, 50), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)).to(dtype)


def back(entry, parts, dtype=None):
    out = torch.full(entry.shape, 5.0).to(dtype or entry.dtype)
    codec.check("w", entry, parts)
    codec.verify("w", entry, parts)
    codec.decode("w", entry, parts, out)
    return out


def raw(value):
    return value.dtype, bytes(container.memory(value.contiguous()))


def test_many_zeros_are_stored_as_places_and_values_and_few_as_they_are():
    entry, parts = codec.encode("w", tensor(0.05))
    assert set(parts) == {"w:where", "w:low", "w:values"} and entry.active == parts["w:values"].shape[0] and entry.low
    entry, parts = codec.encode("w", tensor(0.6))
    assert set(parts) == {"w:where", "w:top", "w:rest"} and parts["w:where"].shape == (250,)
    assert parts["w:top"].nbytes < entry.active / 2 and parts["w:rest"].shape == (entry.active, 3)
    entry, parts = codec.encode("w", (1e4 * tensor(0.6)).int())  # whole numbers have no exponents
    assert set(parts) == {"w:where", "w:values"}
    entry, parts = codec.encode("w", tensor(1.0))
    assert set(parts) == {"w"} and entry.active is None
    _, parts = codec.encode("w", tensor(0.05, (4, 4)))  # so small that its parts would cost more in the header
    assert set(parts) == {"w"}


def test_masks_take_a_bit_for_each_entry_at_most():
    mask = tensor(0.5) != 0
    entry, parts = codec.encode("w", mask)
    assert sum(part.nbytes for part in parts.values()) == 250 and raw(back(entry, parts)) == raw(mask)


@pytest.mark.parametrize("dtype", container.DTYPES.values(), ids=str)
@pytest.mark.parametrize("density", [0, 0.1, 0.7, 1])
def test_every_dtype_comes_back_bit_for_bit(dtype, density):
    generator = torch.Generator().manual_seed(1)
    flat = torch.randint(0, 256, (1000 * dtype.itemsize,), generator=generator).to(torch.uint8)
    kept = (torch.rand(1000, generator=generator) < density).repeat_interleave(dtype.itemsize)
    value = flat.where(kept, 0)
    value = (value > 0) if dtype == torch.bool else value.view(dtype)
    entry, parts = codec.encode("w", value, signed_zeros=True)
    assert raw(back(entry, parts)) == raw(value)


def test_nan_is_kept_and_negative_zero_counts_as_zero_unless_it_is_asked_for():
    value = tensor(0.1)
    value[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    entry, parts = codec.encode("w", value)
    found = back(entry, parts)
    assert raw(found) == raw(value.where(value != 0, 0)) and not found[0, 2].signbit()
    entry, parts = codec.encode("w", value, signed_zeros=True)
    assert raw(back(entry, parts)) == raw(value)


def test_any_layout_is_read_and_written():
    value = tensor(0.2, (8, 4, 5, 5)).to(memory_format=torch.channels_last)
    entry, parts = codec.encode("w", value)
    out = torch.empty(8, 4, 5, 5).to(memory_format=torch.channels_last)
    codec.decode("w", entry, parts, out)
    assert torch.equal(out, value) and out.is_contiguous(memory_format=torch.channels_last)
    column = torch.empty(5, 5, 4, 8).permute(3, 2, 1, 0)
    codec.decode("w", entry, parts, column)
    assert torch.equal(column, value)


def test_numbers_in_bfloat16():
    value = tensor(0.2)
    entry, parts = codec.encode("w", value, torch.bfloat16)
    assert entry.stored == torch.bfloat16 and entry.dtype == torch.float32
    assert torch.equal(back(entry, parts), value.bfloat16().float())
    assert torch.equal(back(entry, parts, torch.float64), value.bfloat16().double())


def test_numbers_in_int8_are_those_of_the_engine():
    for density in (0.2, 1.0):
        value = tensor(density, (8, 6, 5, 5))
        entry, parts = codec.encode("w", value, torch.int8)
        stored, scales = quantised_weight(value)
        assert torch.equal(back(entry, parts), stored * scales.view(-1, 1, 1, 1))
        assert parts["w:scales"].shape == (8,)


def test_only_floating_matrices_are_rounded():
    for value in (torch.randn(5), torch.ones(3, 3, dtype=torch.int64), torch.ones(3, 3).bfloat16()):
        entry, parts = codec.encode("w", value, torch.bfloat16)
        assert raw(back(entry, parts)) == raw(value)


def test_int8_refuses_what_it_cannot_hold():
    value = tensor(0.2)
    value[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.encode("w", value, torch.int8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": [2, 3], "dtype": "float31"}, "its dtype is 'float31'"),
        ({"shape": [2, 3], "dtype": "float32", "stored": "int9"}, "its dtype is 'int9'"),
        ({"shape": [2, -3], "dtype": "float32"}, "whole numbers is allowed"),
        ({"shape": [2**30, 2**30], "dtype": "float32"}, "has more than"),
        ({"shape": [2, 3], "dtype": "float32", "active": 7}, "7 of its entries are stored, and it has 6"),
        ({"shape": [2, 3], "dtype": "float32", "active": -1}, "-1 of its entries"),
        ({"shape": [2, 3], "dtype": "float32", "active": 2, "low": 64}, "64, and 0 to 40 are allowed"),
    ],
)
def test_an_entry_that_is_impossible_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Entry.from_json(values)


def test_an_entry_is_plain_data_and_back():
    rounded = Entry((2, 3), torch.float32, torch.int8, 4, 1)
    for entry in (rounded, Entry((2, 3), torch.float32, torch.float32, 4), Entry((), torch.bool, torch.bool)):
        assert Entry.from_json(entry.as_json()) == entry
