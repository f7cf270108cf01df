"""Clearing in place is exact for every dtype and layout, and erases NaN."""

import pytest
import torch

from granet.sparsifier.masking import clear, leaks, like

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_clear_equals_a_plain_multiplication(dtype, layout):
    torch.manual_seed(0)
    tensor = torch.randn(12, 5, 3, 3).to(dtype)
    if layout == "channels_last":
        tensor = tensor.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        tensor = tensor.transpose(0, 1)
    elif layout == "strided":
        tensor = torch.randn(24, 5, 3, 3).to(dtype)[::2]
    mask = like(torch.rand(tensor.shape) < 0.3, tensor)
    expected = tensor * mask
    tensor[~mask] = float("nan")
    other = torch.full(tensor.shape, -1.0)  # in another layout, of another dtype, in the same call
    clear([(mask, [tensor, other])])
    assert torch.equal(tensor, expected)
    assert torch.equal(other, -1.0 * mask)
    assert not leaks([(mask, [tensor, other])])


def test_larger_than_one_piece():
    tensor, mask = torch.randn(700_001), torch.rand(700_001) < 0.5
    expected = torch.where(mask, tensor, 0.0)
    clear([(mask, [tensor])])
    assert torch.equal(tensor, expected)
    assert not torch.signbit(tensor[~mask]).any()


def test_leaks_sees_a_single_entry():
    mask = torch.rand(50, 50) < 0.5
    tensor = torch.randn(50, 50) * mask
    assert not leaks([(mask, [tensor])])
    place = (~mask).nonzero()[-1]
    for value in (1e-45, float("nan")):
        tensor[tuple(place)] = value
        assert leaks([(mask, [tensor])])


def test_like_follows_the_memory_layout():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 3, 2, 2) < 0.5
    assert like(mask, weight).stride() == weight.stride()
    assert torch.equal(like(mask, weight), mask)
    assert like(mask, torch.empty(4, 3, 2, 2)) is mask


def test_a_negative_zero_is_no_leak():
    assert not leaks([(torch.tensor([True, False]), [torch.tensor([1.0, -0.0])])])
