"""Whether the weights that a compiled model was packed from are noticed to have changed."""

import numpy as np
import pytest
import torch
from small_models import change_in_place, close, counting, mlp, sparse
from torch import nn

import granet
from granet.engine import inference
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


def test_changes_are_followed_whatever_device_tensors_are_made_on(always):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    change_in_place(model)
    expected = model(x).detach()
    torch.set_default_device("meta")
    try:
        found = [fast(x) for _ in range(3)]
    finally:
        torch.set_default_device(None)
    for y in found:
        close(y, expected)


def test_words_that_do_not_belong_to_addresses_are_refused():
    with pytest.raises(RuntimeError, match="as many int32 words as int64 addresses"):
        torch.ops.granet.words_are(torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))


def set_weight(model):
    model[0].weight = nn.Parameter(torch.randn(32, 16))


def change_data(model):
    model[0].weight.data.mul_(2)


def set_data(model):
    model[0].weight.data = torch.randn(32, 16)


def load(model):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})


def replace_module(model):
    model[1] = nn.SiLU()


def append_module(model):
    model.append(nn.Linear(8, 8))


@pytest.mark.parametrize(
    "change", [set_weight, change_in_place, change_data, set_data, load, replace_module, append_module]
)
def test_changes_of_the_model_are_followed(change, always):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    close(fast(x), model(x).detach())
    before = fast(x)
    change(model)
    for _ in range(3):
        close(fast(x), model(x).detach())
    assert not torch.allclose(fast(x), before, atol=1e-3)
    assert all(counting(fast)(x))  # the new weights are packed by now


def test_loading_into_the_compiled_model_changes_what_it_computes(always):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    fast.load_state_dict({f"model.{k}": 2 * v for k, v in model.state_dict().items()})
    for _ in range(3):
        close(fast(x), model(x).detach())


def test_weights_that_change_at_every_call_run_dense(always):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    packed = counting(fast)
    for _ in range(3):
        change_in_place(model)
        close(fast(x), model(x).detach())
    change_in_place(model)
    assert packed(x) == [False]
    assert packed(x) == [True]
    close(fast(x), model(x).detach())


def test_effective_weights_are_folded(always):
    """Weights that the model computes from parameters alone are computed once, and anew when those change."""
    model, x = sparse(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))), torch.randn(4, 16)
    nn.utils.parametrizations.weight_norm(model[0])
    fast = inference.compile(model, x)
    assert fast.report().chosen == "sparse" and len(fast.report().layers) == 2
    close(fast(x), model(x).detach())
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    for _ in range(3):
        close(fast(x), model(x).detach())
    str_model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    granet.Sparsifier(str_model, granet.STR(s_init=-4.0))
    fast = inference.compile(str_model.eval(), x)
    assert len(fast.report().layers) == 2
    close(fast(x), str_model(x).detach())
