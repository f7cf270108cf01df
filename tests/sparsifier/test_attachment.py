"""Optimizers as people write and combine them: after each step the zeros are there, and steps are counted rightly."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import granet
from granet import GMP, RigL, Sparsifier, Static
from granet.sparsifier.attachment import family

X, Y = torch.randn(64, 20, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def dirt(sparsifier, *optimizers):
    """How many inactive weights, or entries of what optimizers and those inside of them remember, are not zero."""
    total = 0
    members = [member for optimizer in optimizers for member in family(optimizer)]
    for name, mask in sparsifier.masks.items():
        p = sparsifier.model.get_parameter(name)
        buffers = [v for o in members if p in o.state for v in o.state[p].values() if torch.is_tensor(v)]
        total += sum(int((t.detach()[~mask] != 0).sum()) for t in (p, *buffers) if t.shape == p.shape)
    return total


def loss(model):
    return F.cross_entropy(model(X), Y)


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
    model = mlp()
    sparsifier = Sparsifier(model, method)
    optimizer = SAM(model.parameters(), base, lr=0.01)
    sparsifier.attach(optimizer)

    def gradients():
        optimizer.zero_grad()
        loss(model).backward()

    for step in range(1, 41):
        gradients()
        if closure:
            optimizer.step(gradients)
        else:
            optimizer.first_step()
            gradients()
            optimizer.second_step()
        assert sparsifier.step == step
        assert dirt(sparsifier, optimizer) == 0
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 1 - method.sparsity)
    assert sparsifier.version >= 4


def test_gradients_that_two_nested_optimizers_hold_are_clipped_once():
    norms = []
    for nested in (True, False):
        model = mlp()
        sparsifier = Sparsifier(model, Static(sparsity=0.9))
        kind = torch.optim.SGD
        optimizer = SAM(model.parameters(), kind, lr=0.1) if nested else kind(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        loss(model).backward()
        norms.append(sparsifier.clip_grad_norm_(1e-3))
    assert norms[0] == norms[1]


def test_a_sam_that_is_given_a_closure_climbs_within_the_sparse_network():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    sparsifier.attach(optimizer)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(dirt(sparsifier))
        loss(model).backward()

    for _ in range(3):
        closure()
        optimizer.step(closure)
    assert len(seen) == 6 and not any(seen)


@pytest.mark.parametrize(("kind", "when"), [(Lookahead, 6), (Late, 25)])
def test_zeros_that_an_optimizer_fills_late_are_restored_at_once_and_said(kind, when):
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = kind(model.parameters())
    sparsifier.attach(optimizer)
    for step in range(1, 200):
        optimizer.zero_grad()
        loss(model).backward()
        if step == when:
            with pytest.warns(RuntimeWarning, match=f"at step {when} inactive weights.*{kind.__name__} remembers"):
                optimizer.step()
        else:
            optimizer.step()
        assert dirt(sparsifier, optimizer) == 0
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

    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = Averaging(torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.attach(optimizer)
    for step in range(1, 12):
        model.zero_grad()
        loss(model).backward()
        if step == 6:
            with pytest.warns(RuntimeWarning, match="a wrapper around this one moves weights"):
                optimizer.step()
            assert dirt(sparsifier, optimizer) == 0
        else:
            optimizer.step()
    assert sparsifier.step == 11


@pytest.mark.parametrize("plain_before", [False, True])  # torch then hooks the inner step as well
@pytest.mark.parametrize("method", [GMP(sparsity=0.9, end=100, interval=10), RigL(sparsity=0.9, end=100, interval=10)])
def test_a_step_that_calls_the_step_of_its_parent_counts_once(method, plain_before):
    if plain_before:
        torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    model = mlp()
    sparsifier = Sparsifier(model, method)
    optimizer = Clamping(model.parameters())
    sparsifier.attach(optimizer)
    for step in range(1, 51):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        assert sparsifier.step == step and dirt(sparsifier, optimizer) == 0
    assert sparsifier.version == 5


def test_a_step_that_failed_leaves_the_count_right():
    """An interrupted step must not make the next one look as if it were inside of it."""
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = Clamping(model.parameters())
    sparsifier.attach(optimizer)

    def interrupted():
        raise KeyboardInterrupt

    for step in range(1, 4):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(interrupted)
        loss(model).backward()
        optimizer.step()
        assert sparsifier.step == step


def gan():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    maker = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))
    return nn.ModuleDict({"d": critic, "g": maker})


@pytest.mark.parametrize("critic_steps", [1, 3])
@pytest.mark.parametrize("order", ["dg", "gd"])
def test_two_optimizers_stepped_at_different_times_grow_by_their_own_gradients(order, critic_steps):
    net = gan()
    sparsifier = Sparsifier(net, RigL(sparsity=0.8, interval=10, end=1000))
    d, g = (torch.optim.Adam(net[part].parameters(), 1e-3) for part in "dg")
    sparsifier.attach(*((d, g) if order == "dg" else (g, d)))
    rng, hits = torch.Generator().manual_seed(0), 0
    for step in range(1, 41):
        before, kept = dict(sparsifier.masks), {}
        real, z = torch.randn(16, 8, generator=rng), torch.randn(16, 4, generator=rng)
        for _ in range(critic_steps):
            d.zero_grad()
            fake = net["d"](net["g"](z).detach())
            (F.softplus(-net["d"](real)) + F.softplus(fake)).mean().backward()
            kept |= {name: net.get_parameter(name).grad.clone() for name in before if name.startswith("d.")}
            d.step()
        g.zero_grad()
        F.softplus(-net["d"](net["g"](z))).mean().backward()
        kept |= {name: net.get_parameter(name).grad.clone() for name in before if name.startswith("g.")}
        g.step()
        assert sparsifier.step == step and dirt(sparsifier, d, g) == 0
        for name, mask in sparsifier.masks.items():
            grown = mask & ~before[name]
            if grown.any():
                scores = kept[name].abs().masked_fill(before[name], 0)
                least = scores.flatten().sort().values[-int(grown.sum())]
                hits += 1
                # what was dropped in this update may come back first
                assert (scores[grown] >= least).all()
    assert hits >= 8


def test_an_optimizer_that_is_never_stepped_is_named():
    net = gan()
    sparsifier = Sparsifier(net, GMP(sparsity=0.8, interval=10, end=1000))
    d, g = (torch.optim.SGD(net[part].parameters(), 1e-3) for part in "dg")
    sparsifier.attach(d, g)

    def step():
        d.zero_grad()
        net["d"](torch.randn(4, 8)).mean().backward()
        d.step()

    for _ in range(100):
        step()
    with pytest.warns(RuntimeWarning, match=r"SGD \(it holds 'g.0.weight'\) was attached and has not stepped for 100"):
        step()
    assert sparsifier.step == 0
    assert dirt(sparsifier, d) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_an_optimizer_for_each_parameter_that_steps_in_the_backward_pass(turned):
    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=5))
    optimizers = {p: torch.optim.Adam([p], 0.01) for p in model.parameters()}
    listed = list(optimizers.values())
    sparsifier.attach(*(reversed(listed) if turned else listed))

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)
    for step in range(1, 21):
        loss(model).backward()
        assert sparsifier.step == step and dirt(sparsifier, *listed) == 0
    assert sparsifier.version == 4


def test_a_list_of_optimizers_inside_of_one_object():
    class Both:
        def __init__(self, *optimizers):
            self.optimizers = list(optimizers)

        @property
        def param_groups(self):
            return [group for optimizer in self.optimizers for group in optimizer.param_groups]

        def step(self):
            for optimizer in self.optimizers:
                optimizer.step()

    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=5))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    both = Both(torch.optim.Muon(matrices), torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=0.1))
    sparsifier.attach(both)
    for step in range(1, 16):
        model.zero_grad()
        loss(model).backward()
        both.step()
        assert sparsifier.step == step and dirt(sparsifier, *both.optimizers) == 0


def test_a_compiled_step_of_the_optimizer():
    torch._dynamo.reset()
    for kind in (torch.optim.AdamW, Clamping):
        model = mlp()
        sparsifier = Sparsifier(model, RigL(sparsity=0.9, end=40, interval=5))
        optimizer = kind(model.parameters())
        sparsifier.attach(optimizer)
        compiled = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        for step in range(1, 13):
            optimizer.zero_grad()
            loss(model).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, at the first compilation
                compiled()
            assert sparsifier.step == step and dirt(sparsifier, optimizer) == 0
        assert sparsifier.version == 2


def test_a_group_that_is_added_later_is_masked():
    model = mlp()
    model[0].requires_grad_(False)
    sparsifier = Sparsifier(model, Static(sparsity=0.9), only="linear")
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for step in range(10):
        if step == 5:
            optimizer.add_param_group({"params": model[0].requires_grad_(True).parameters()})
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        assert sparsifier.step == step + 1 and dirt(sparsifier, optimizer) == 0
    assert model[0].weight.grad is not None


def test_a_copy_of_several_optimizers_trains_as_they_do():
    net = gan()
    sparsifier = Sparsifier(net, Static(sparsity=0.8))
    pair = [torch.optim.SGD(net[part].parameters(), 0.1) for part in "dg"]
    sparsifier.attach(*pair)
    net, pair, sparsifier = copy.deepcopy((net, pair, sparsifier))
    for step in range(1, 6):
        net["d"](net["g"](torch.ones(2, 4))).sum().backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier.step == step and dirt(sparsifier, *pair) == 0


def test_gradients_that_other_code_has_masked_do_not_decide_where_to_grow():
    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    before = dict(sparsifier.masks)
    for step in range(1, 4):
        optimizer.zero_grad()
        loss(model).backward()
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
