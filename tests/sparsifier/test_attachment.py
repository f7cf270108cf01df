"""One optimizer as people write and wrap it: after each step the zeros are there, and steps are counted rightly."""

import warnings

import pytest
import torch
from small_training import class_loss, nonzero_inactive_nested, two_layers
from torch import nn

import granet
from granet import GMP, RigL, Sparsifier, Static


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: an ascent by the gradient, a second gradient there, and the inner optimizer."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
            p.grad = None

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Every few steps the weights go back half the way to slow weights, which lie outside of the state."""

    def __init__(self, params, every=6):
        super().__init__(params, {"lr": 0.1})
        self.every, self.n = every, 0
        self.slow = {p: p.detach().clone() + 0.1 for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.n += 1
        for p, slow in self.slow.items():
            p.sub_(p.grad, alpha=0.1)
            if self.n % self.every == 0:
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Late(Lookahead):
    """Mixes the weights of a matrix, but only from its 25th step on, as Shampoo does."""

    @torch.no_grad()
    def step(self, closure=None):
        self.n += 1
        for p in self.slow:
            grad = p.grad
            if self.n >= 25 and grad.ndim == 2:
                grad = torch.linalg.solve(grad @ grad.T + 0.01 * torch.eye(len(grad)), grad)
            p.sub_(grad, alpha=0.01)


class Clamping(torch.optim.Adam):
    """A subclass that does something of its own after the step of its parent."""

    def step(self, closure=None):
        value = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-2, 2)
        return value


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("method", [GMP(sparsity=0.9, end=30, interval=5), RigL(sparsity=0.8, end=40, interval=5)])
def test_sam_trains_sparse_in_both_ways_of_calling_it(method, closure, base):
    model = two_layers()
    sparsifier = Sparsifier(model, method)
    optimizer = SAM(model.parameters(), base, lr=0.01)
    sparsifier.attach(optimizer)

    def gradients():
        optimizer.zero_grad()
        class_loss(model).backward()

    for step in range(1, 41):
        gradients()
        if closure:
            optimizer.step(gradients)
        else:
            optimizer.first_step()
            gradients()
            optimizer.second_step()
        assert sparsifier.step == step
        assert nonzero_inactive_nested(sparsifier, optimizer) == 0
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 1 - method.sparsity)
    assert sparsifier.version >= 4


def test_gradients_that_two_nested_optimizers_hold_are_clipped_once():
    norms = []
    for nested in (True, False):
        model = two_layers()
        sparsifier = Sparsifier(model, Static(sparsity=0.9))
        kind = torch.optim.SGD
        optimizer = SAM(model.parameters(), kind, lr=0.1) if nested else kind(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        class_loss(model).backward()
        norms.append(sparsifier.clip_grad_norm_(1e-3))
    assert norms[0] == norms[1]


def test_a_sam_that_is_given_a_closure_climbs_within_the_sparse_network():
    model = two_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    sparsifier.attach(optimizer)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(nonzero_inactive_nested(sparsifier))
        class_loss(model).backward()

    for _ in range(3):
        closure()
        optimizer.step(closure)
    assert len(seen) == 6 and not any(seen)


@pytest.mark.parametrize(("kind", "when"), [(Lookahead, 6), (Late, 25)])
def test_zeros_that_an_optimizer_fills_late_are_restored_at_once_and_said(kind, when):
    model = two_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = kind(model.parameters())
    sparsifier.attach(optimizer)
    for step in range(1, 200):
        optimizer.zero_grad()
        class_loss(model).backward()
        if step == when:
            with pytest.warns(RuntimeWarning, match=f"at step {when} inactive weights.*{kind.__name__} remembers"):
                optimizer.step()
        else:
            optimizer.step()
        assert nonzero_inactive_nested(sparsifier, optimizer) == 0
    assert sparsifier._attached.kept is False


def test_a_wrapper_that_moves_weights_behind_the_step_is_found_at_the_next():
    """No hook of torch's reaches a wrapper that is no torch optimizer."""

    class Averaging:
        def __init__(self, optimizer):
            self.optimizer, self.n = optimizer, 0
            self.slow = [p.detach().clone() + 0.1 for p in optimizer.param_groups[0]["params"]]

        @torch.no_grad()
        def step(self):
            self.optimizer.step()
            self.n += 1
            if self.n % 5 == 0:
                for p, slow in zip(self.optimizer.param_groups[0]["params"], self.slow, strict=True):
                    p.copy_(slow)

    model = two_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = Averaging(torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.attach(optimizer)
    for step in range(1, 12):
        model.zero_grad()
        class_loss(model).backward()
        if step == 6:
            with pytest.warns(RuntimeWarning, match="a wrapper around this one moves weights"):
                optimizer.step()
            assert nonzero_inactive_nested(sparsifier, optimizer) == 0
        else:
            optimizer.step()
    assert sparsifier.step == 11


@pytest.mark.parametrize("plain_before", [False, True])  # torch then hooks the inner step as well
@pytest.mark.parametrize("method", [GMP(sparsity=0.9, end=100, interval=10), RigL(sparsity=0.9, end=100, interval=10)])
def test_a_step_that_calls_the_step_of_its_parent_counts_once(method, plain_before):
    if plain_before:
        torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    model = two_layers()
    sparsifier = Sparsifier(model, method)
    optimizer = Clamping(model.parameters())
    sparsifier.attach(optimizer)
    for step in range(1, 51):
        optimizer.zero_grad()
        class_loss(model).backward()
        optimizer.step()
        assert sparsifier.step == step and nonzero_inactive_nested(sparsifier, optimizer) == 0
    assert sparsifier.version == 5


def test_a_step_that_failed_leaves_the_count_right():
    """An interrupted step must not make the next one look as if it were inside of it."""
    model = two_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = Clamping(model.parameters())
    sparsifier.attach(optimizer)

    def interrupted():
        raise KeyboardInterrupt

    for step in range(1, 4):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(interrupted)
        class_loss(model).backward()
        optimizer.step()
        assert sparsifier.step == step


def test_a_compiled_step_of_the_optimizer():
    torch._dynamo.reset()
    for kind in (torch.optim.AdamW, Clamping):
        model = two_layers()
        sparsifier = Sparsifier(model, RigL(sparsity=0.9, end=40, interval=5))
        optimizer = kind(model.parameters())
        sparsifier.attach(optimizer)
        compiled = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        for step in range(1, 13):
            optimizer.zero_grad()
            class_loss(model).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, at the first compilation
                compiled()
            assert sparsifier.step == step and nonzero_inactive_nested(sparsifier, optimizer) == 0
        assert sparsifier.version == 2


def test_a_group_that_is_added_later_is_masked():
    model = two_layers()
    model[0].requires_grad_(False)
    sparsifier = Sparsifier(model, Static(sparsity=0.9), only="linear")
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for step in range(10):
        if step == 5:
            optimizer.add_param_group({"params": model[0].requires_grad_(True).parameters()})
        optimizer.zero_grad()
        class_loss(model).backward()
        optimizer.step()
        assert sparsifier.step == step + 1 and nonzero_inactive_nested(sparsifier, optimizer) == 0
    assert model[0].weight.grad is not None


def test_gradients_that_other_code_has_masked_do_not_decide_where_to_grow():
    model = two_layers()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    before = dict(sparsifier.masks)
    for step in range(1, 4):
        optimizer.zero_grad()
        class_loss(model).backward()
        sparsifier.mask_gradients()
        if step == 3:
            with (
                pytest.warns(RuntimeWarning, match="'0.weight' and 1 more is zero: other code has masked"),
                pytest.warns(RuntimeWarning, match="no sparse parameter has a gradient"),
            ):
                optimizer.step()
        else:
            optimizer.step()
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in before.items())
