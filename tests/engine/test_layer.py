"""However an accelerated model is called, its numbers are those of the dense one."""

import pytest
import torch
from fuzz_training import check_random_calls, same
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from twins import Counted

import granet

pytestmark = [
    # torch's own: forward-mode derivatives load decompositions through torch.jit.script
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.mark.parametrize("seed", range(2))
def test_random_calls_have_the_derivatives_of_the_dense_layer(seed, always_sparse):
    check_random_calls(12, seed)


def test_a_gradient_penalty_is_that_of_the_dense_model(twins):
    def penalty_gradient(net):
        z = twins.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        return torch.autograd.grad((slope.norm(dim=1) - 1).square().mean(), [net[0].weight, net[2].weight])

    for name, found, expected in zip(
        ("0", "2"), penalty_gradient(twins.fast), penalty_gradient(twins.dense), strict=True
    ):
        same(found, expected, name, twins.sparsifier.masks[f"{name}.weight"])
    assert twins.sparse_calls == 2  # the forward still ran on the kernels


def test_third_derivatives(twins):
    def third(net):
        z = twins.x.clone().requires_grad_()
        value = net(z).sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, z, create_graph=True)
            value = slope.square().sum()
        return slope.detach()

    same(third(twins.fast), third(twins.dense), "third derivative")


def test_dense_gradients_due_for_an_update_can_be_differentiated_too(monkeypatch, always_sparse, precision):
    twins = Counted(monkeypatch, granet.RigL(sparsity=0.6, end=20, interval=1))
    twins.sparsifier.attach(torch.optim.SGD(twins.fast.parameters(), lr=0.1))
    assert twins.sparsifier.dense_grad_due

    def second(net):
        slopes = torch.autograd.grad(net(twins.x).square().sum(), list(net.parameters()), create_graph=True)
        return torch.autograd.grad(sum(s.square().sum() for s in slopes), list(net.parameters()))

    for found, expected in zip(second(twins.fast), second(twins.dense), strict=True):
        same(found, expected, "second derivative, inactive weights too")


def test_forward_mode_derivatives(twins):
    def tangent(net):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(twins.x, torch.ones_like(twins.x))
            return torch.autograd.forward_ad.unpack_dual(net(dual)).tangent

    same(tangent(twins.fast), tangent(twins.dense), "tangent of a dual number")
    direction = (torch.ones_like(twins.x),)
    same(jvp(twins.fast, (twins.x,), direction)[1], jvp(twins.dense, (twins.x,), direction)[1], "jvp")


def test_gradients_of_each_sample(twins):
    parameters = {name: p.detach() for name, p in twins.fast.named_parameters()}

    def of_one(net):
        loss = lambda p, z: functional_call(net, p, (z[None],)).square().sum()  # noqa: E731
        return vmap(grad(loss), (None, 0))(parameters, twins.x)

    found, expected = of_one(twins.fast), of_one(twins.dense)
    for name in parameters:
        same(found[name], expected[name], name)


def test_hessians_and_jacobians(twins):
    one = twins.x[:1]
    for compute in (
        lambda net: torch.autograd.functional.hessian(lambda z: net(z).square().sum(), one),
        lambda net: torch.autograd.functional.jacobian(net, one, vectorize=True),
        lambda net: torch.autograd.functional.jacobian(net, one, vectorize=True, strategy="forward-mode"),
        lambda net: torch.func.hessian(lambda z: net(z).square().sum())(one),
        lambda net: torch.func.jacrev(net)(one),
    ):
        same(compute(twins.fast), compute(twins.dense), "jacobian or hessian")


def test_several_gradients_at_once(twins):
    def rows(net):
        z = twins.x.clone().requires_grad_()
        return torch.autograd.grad(net(z).sum(0), z, torch.eye(4), is_grads_batched=True)[0]

    same(rows(twins.fast), rows(twins.dense), "rows of the Jacobian")


def test_weights_that_are_passed_are_the_weights_that_are_used(twins):
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in twins.fast.named_parameters()}
    outputs = [functional_call(net, other, (twins.x,)) for net in (twins.fast, twins.dense)]
    same(outputs[0], outputs[1], "output")
    first, second = (torch.autograd.grad(y.square().sum(), list(other.values())) for y in outputs)
    for name, a, b in zip(other, first, second, strict=True):
        same(a, b, name)


def test_weights_changed_in_place_loaded_or_replaced_are_the_weights_that_are_used(twins):
    twins.agree()
    state = {name: torch.randn_like(value) for name, value in twins.fast.state_dict().items()}
    for net in (twins.fast, twins.dense):
        net.load_state_dict(state)  # nothing of it is zero
    twins.agree(sparse=False)
    with torch.no_grad():
        for net in (twins.fast, twins.dense):
            for name, mask in twins.sparsifier.masks.items():
                net.get_parameter(name).mul_(mask)
    twins.agree()
    for net in (twins.fast, twins.dense):
        net[0].weight.data = state["0.weight"].clone()
        net[2].weight = nn.Parameter(state["2.weight"].clone())
    twins.agree(sparse=False)


def test_weights_loaded_right_after_a_step_are_used(monkeypatch, always_sparse, precision):
    twins = Counted(monkeypatch)
    optimizer = torch.optim.SGD(twins.fast.parameters(), lr=0.1)
    twins.sparsifier.attach(optimizer)
    looks = []
    leaks = granet.engine.layer.masking.leaks
    monkeypatch.setattr(
        granet.engine.layer.masking, "leaks", lambda work, **more: looks.append(1) or leaks(work, **more)
    )
    for _ in range(5):
        twins.fast(twins.x).square().sum().backward()
        looks.clear()
        optimizer.step()
        by_the_sparsifier = len(looks)
        twins.dense.load_state_dict(twins.fast.state_dict())
        twins.agree()
        assert len(looks) == by_the_sparsifier  # after a step of the sparsifier's optimizer there is no need to look
    state = {name: torch.ones_like(value) for name, value in twins.fast.state_dict().items()}
    optimizer.step()
    for net in (twins.fast, twins.dense):
        net.load_state_dict(state)
    twins.agree(sparse=False)


@pytest.mark.parametrize("change", ["parametrize", "prune", "weight_norm"])
def test_weights_made_from_others_are_used(twins, change):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight + 1

    for net in (twins.fast, twins.dense):
        torch.manual_seed(1)
        if change == "parametrize":
            nn.utils.parametrize.register_parametrization(net[0], "weight", Double())
        elif change == "prune":
            prune.l1_unstructured(net[0], "weight", 0.7)
        else:
            nn.utils.parametrizations.weight_norm(net[0])
            with torch.no_grad():
                net[0].parametrizations.weight.original0.mul_(3)
    twins.agree()  # the other layer still runs sparse
    assert twins.sparse_calls == 1


def test_another_autocast_than_the_plans_runs_dense(twins, precision):
    for dtype, enabled in ((torch.float16, True), (torch.bfloat16, precision == "float32")):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            found, expected = twins.fast(twins.x), twins.dense(twins.x)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert not twins.sparse_calls


def test_no_gradients_wanted(twins):
    with torch.no_grad():
        assert not twins.fast(twins.x).requires_grad
    with torch.inference_mode():
        same(twins.fast(twins.x), twins.dense(twins.x), "output in inference mode")
    twins.fast.requires_grad_(False)
    assert not twins.fast(twins.x).requires_grad
    z = twins.x.clone().requires_grad_()
    twins.fast(z).sum().backward()
    assert z.grad is not None and twins.fast[0].weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_also_right_after_an_update(monkeypatch, always_sparse, reentrant, precision):
    """The first forward after an update measures layers anew, which a checkpoint that counts tensors must not see."""
    twins = Counted(monkeypatch, granet.GraNet(sparsity=0.9, initial_sparsity=0.2, end=6, total=8, interval=2))
    optimizer = torch.optim.SGD(twins.fast.parameters(), lr=0.1)
    twins.sparsifier.attach(optimizer)
    for _ in range(7):
        z = twins.x.clone().requires_grad_()
        optimizer.zero_grad()
        checkpoint(twins.fast, z, use_reentrant=reentrant).square().sum().backward()
        twins.dense.load_state_dict(twins.fast.state_dict())
        expected = torch.autograd.grad(
            twins.dense(twins.x).square().sum(), [twins.dense[0].weight, twins.dense[0].bias]
        )
        same(twins.fast[0].weight.grad, expected[0], "weight", twins.sparsifier.masks["0.weight"])
        same(twins.fast[0].bias.grad, expected[1], "bias")
        optimizer.step()
    assert twins.sparsifier.version >= 2


def test_an_evaluation_right_after_an_update(monkeypatch, always_sparse, precision):
    twins = Counted(monkeypatch, granet.GraNet(sparsity=0.9, initial_sparsity=0.2, end=4, total=8, interval=2))
    optimizer = torch.optim.SGD(twins.fast.parameters(), lr=0.1)
    twins.sparsifier.attach(optimizer)
    for _ in range(5):
        twins.fast(twins.x).square().sum().backward()
        optimizer.step()
        twins.dense.load_state_dict(twins.fast.state_dict())
        with torch.inference_mode():
            same(twins.fast(twins.x), twins.dense(twins.x), "output")
    assert twins.plan.report().layers[0].density < 0.5


def test_loops_that_call_the_sparsifier_by_hand(monkeypatch, always_sparse, precision):
    twins = Counted(monkeypatch, granet.SET(sparsity=0.6, total=10, interval=2))
    optimizer = torch.optim.SGD(twins.fast.parameters(), lr=0.1, momentum=0.9)
    twins.sparsifier.attach(optimizer, hooks=False)
    for _ in range(5):
        twins.fast(twins.x).square().sum().backward()
        twins.sparsifier.before_step()
        optimizer.step()
        twins.sparsifier.after_step()
        optimizer.zero_grad()
        twins.dense.load_state_dict(twins.fast.state_dict())
        twins.agree()
    twins.fast(twins.x).square().sum().backward()
    with pytest.warns(RuntimeWarning, match="without before_step"):
        optimizer.step()  # inactive weights have moved
    twins.dense.load_state_dict(twins.fast.state_dict())
    twins.agree()
    twins.fast(twins.x[:0])


def test_inputs_that_do_not_fit_raise_torchs_own_error(twins):
    for wrong in (torch.randn(4, 32), torch.randn(16, 8), torch.randn(8, 16).double(), torch.tensor(1.0)):
        messages = []
        for net in (twins.fast, twins.dense):
            with pytest.raises(RuntimeError) as raised:
                net[0](wrong)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_a_kernel_larger_than_the_image_raises_torchs_own_error(always_sparse):
    model = nn.Conv2d(4, 4, 5)
    granet.accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.6)), torch.randn(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        model(torch.randn(2, 4, 4, 4))


def test_a_forward_wrapped_by_others_is_dense_after_remove(twins):
    inner = twins.fast[0].forward
    twins.fast[0].forward = lambda x: inner(x)
    twins.agree()
    twins.plan.remove()
    twins.agree(sparse=False)


def test_data_parallel_training(twins, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(twins.fast)
        parallel(twins.x).square().sum().backward()
        assert twins.sparse_calls == 2
        twins.dense(twins.x).square().sum().backward()
        for (name, p), q in zip(twins.fast.named_parameters(), twins.dense.parameters(), strict=True):
            same(p.grad, q.grad, name, twins.sparsifier.masks.get(name))
        del parallel
    finally:
        torch.distributed.destroy_process_group()


def test_layers_called_by_keyword_and_models_too(always_sparse):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, *, x, scale=None):
            return {"y": self.a(input=x) * (1 if scale is None else scale)}

    model, x = Keyword(), torch.randn(4, 16)
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.6))
    expected = F.linear(x, model.a.weight, model.a.bias)
    plan = granet.accelerate(sparsifier, {"x": x})
    assert plan.report().layers[0].chosen == "sparse"
    same(model(x=x)["y"], expected, "output")
    with pytest.raises(TypeError, match="unexpected keyword"):
        model.a(x=x)


def test_a_failure_while_planning_leaves_the_model_as_it_was(always_sparse):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.6))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        granet.accelerate(sparsifier, torch.randn(2, 9))
    assert not any("forward" in module.__dict__ for module in model.modules())
