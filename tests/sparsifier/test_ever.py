"""The union of all masks: bits where masks lie in memory, the same numbers in any case."""

import pytest
import torch

from granet.sparsifier.ever import EverActive


@pytest.mark.parametrize("shape", [(3, 5), (8,), (1,), (2, 3, 4, 5)])
def test_bits_are_the_union_of_the_masks(shape):
    rng = torch.Generator().manual_seed(1)
    masks = [torch.rand(shape, generator=rng) < 0.3 for _ in range(4)]
    ever, union = EverActive({"a": masks[0], "b": masks[1]}), masks[0].clone()
    for mask in masks[1:]:
        ever.add({"a": mask})
        union |= mask
    found = ever.masks()
    assert torch.equal(found["a"], union) and torch.equal(found["b"], masks[1]) and list(found) == ["a", "b"]
    assert ever.count() == int(union.sum() + masks[1].sum())
    assert torch.equal(EverActive(found).masks()["a"], union)


def test_a_bit_a_weight_is_kept_and_a_mask_on_another_device_stays_there():
    ever = EverActive({"a": torch.ones(100, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool, device="meta")})
    assert ever._found["a"].nbytes == 13
    assert ever.masks()["b"].device.type == "meta"
