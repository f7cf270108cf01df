"""Masks that are made from positions when they are looked at."""

import copy
import io

import torch
from stored_training import Training

from granet.sparsifier.sparse_storage.masks import Masks


def masks():
    held = {"a": torch.rand(4, 5) < 0.5, "b": torch.rand(3) < 0.5}
    return held, Masks(held, {"a": (held["a"].view(-1).nonzero().squeeze(1).int(), (4, 5))})


def test_masks_are_those_that_were_given():
    held, found = masks()
    assert list(found) == ["a", "b"] and len(found) == 2 and "c" not in found
    assert all(torch.equal(found[name], mask) for name, mask in held.items())
    found["a"].zero_()
    assert torch.equal(found["a"], held["a"]) and found["b"] is held["b"]


def test_saved_and_copied_masks_are_the_same():
    held, found = masks()
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(found), dict(found)):
        assert list(other) == ["a", "b"] and all(torch.equal(other[name], mask) for name, mask in held.items())


def test_masks_of_before_an_update_stay_what_they_were():
    run = Training("sparse", "rigl").step(3)
    before = run.sparsifier.masks
    values = {name: mask.clone() for name, mask in before.items()}
    run.step(3)
    assert run.sparsifier.version
    assert all(torch.equal(before[name], mask) for name, mask in values.items())
    assert any(not torch.equal(run.sparsifier.masks[name], mask) for name, mask in values.items())
    assert not any(isinstance(one, torch.Tensor) for one in run.sparsifier.masks._all.values())
