"""Whether the weights that a compiled model was packed from are noticed to have changed."""

import numpy as np
import pytest
import torch
from torch import nn

from granet.engine.weights import WeightCheck


def tensors():
    torch.manual_seed(0)
    sparse = torch.randn(8, 16) * (torch.rand(8, 16) < 0.2)
    return [nn.Parameter(sparse), torch.randn(16, 8).t(), torch.randn(3), torch.arange(4), torch.zeros(0)]


def outside(tensor):
    """A write that torch does not see."""
    with torch.no_grad():
        np.asarray(tensor.detach())[:] *= 2


CHANGES = {
    "in place": lambda args: args[0].data.mul_(2),
    "counted": lambda args: args[3].add_(1),
    "memory": lambda args: setattr(args[0], "data", args[0].detach().clone()),
    "not contiguous": lambda args: args[1].mul_(2),
    "outside of torch": lambda args: outside(args[0]),
    "another tensor": lambda args: args.__setitem__(2, args[2].clone()),
    "another type": lambda args: args.__setitem__(2, None),
    "negative zero": lambda args: args[2].data.fill_(-0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    args = tensors()
    check = WeightCheck(args, range(len(args)))
    assert check.same(args) and check.same(list(args))
    CHANGES[change](args)
    assert not check.same(args)
    assert WeightCheck(tensors(), range(5)).same(args) is False


def test_only_the_arguments_asked_for_are_looked_at():
    args = tensors()
    check = WeightCheck(args, {0})
    args[2] = "something else"
    assert check.same(args)
    assert WeightCheck(args, ()).same([])


def test_undefined_numbers_are_the_same_as_themselves():
    args = [torch.full((3,), float("nan"))]
    assert WeightCheck(args, {0}).same(args)


def test_tensors_without_a_version_are_told_by_their_values():
    with torch.inference_mode():
        args = [torch.randn(5)]
        check = WeightCheck(args, {0})
        assert check.same(args)
        args[0].mul_(2)
        assert not check.same(args)


def test_the_memory_that_is_read_outlives_the_tensor_s_own_hold_on_it():
    """A tensor that is given other memory lets go of its own, whose addresses the check still has."""
    args = [nn.Parameter(torch.randn(1 << 20))]
    check = WeightCheck(args, {0})
    for _ in range(3):
        args[0].data = torch.randn(4)
        assert not check.same(args)
    assert torch.ops.granet.words_are(check._addresses, check._words)


def test_words_that_do_not_belong_to_addresses_are_refused():
    with pytest.raises(RuntimeError, match="as many int32 words as int64 addresses"):
        torch.ops.granet.words_are(torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
