"""Several optimizers of one model: each grows by its own gradients, and a step counts when all of them have stepped."""

import copy

import pytest
import torch
from small_training import class_loss, nonzero_inactive_nested, two_layers
from torch import nn
from torch.nn import functional as F

from granet import GMP, RigL, Sparsifier, Static


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
        assert sparsifier.step == step and nonzero_inactive_nested(sparsifier, d, g) == 0
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
    assert nonzero_inactive_nested(sparsifier, d) == 0


@pytest.mark.parametrize("turned", [False, True])
def test_an_optimizer_for_each_parameter_that_steps_in_the_backward_pass(turned):
    model = two_layers()
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
        class_loss(model).backward()
        assert sparsifier.step == step and nonzero_inactive_nested(sparsifier, *listed) == 0
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

    model = two_layers()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=5))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    both = Both(torch.optim.Muon(matrices), torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=0.1))
    sparsifier.attach(both)
    for step in range(1, 16):
        model.zero_grad()
        class_loss(model).backward()
        both.step()
        assert sparsifier.step == step and nonzero_inactive_nested(sparsifier, *both.optimizers) == 0


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
        assert sparsifier.step == step and nonzero_inactive_nested(sparsifier, *pair) == 0
