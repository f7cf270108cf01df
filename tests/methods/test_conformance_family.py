"""STR, AC/DC, GraSP and SynFlow beside plain statements of their authors' programs.

Each statement is written out by itself, with what granet does on purpose; `docs/conformance.md` lists the differences
that were aligned, and those that remain.
"""

import copy
from math import floor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import granet
from granet import ACDC, STR, GraSP, Probe, Sparsifier, SynFlow


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10),
    ).to(dtype)  # fmt: skip


SPARSE = ("0.weight", "4.weight", "8.weight")


def batch(step, size=8):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 8, 8, generator=rng), torch.randint(0, 10, (size,), generator=rng)


def train_both(model, optimizer, other, its_optimizer, forward, steps, after=lambda t: None):
    """Trains granet's model and the statement's side by side; everything is compared after each step."""
    own = dict(model.named_parameters())
    for t in range(1, steps + 1):
        x, y = batch(t)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        its_optimizer.step()
        after(t)
        its_optimizer.zero_grad()
        for name, p in other.items():
            assert torch.equal(own[name], p), (t, name)
            theirs = its_optimizer.state[p]["momentum_buffer"]
            assert torch.equal(optimizer.state[own[name]]["momentum_buffer"], theirs), (t, name)


def test_100_steps_of_str_are_those_of_its_program_to_the_bit():
    """The layers have a threshold of their own, under the same optimizer; norms are not decayed."""

    def groups(named):
        norms = [p for name, p in named.items() if name[0] in "15"]
        thresholds = [p for name, p in named.items() if "threshold" in name]
        rest = [p for p in named.values() if not any(p is one for one in norms + thresholds)]
        return [{"params": norms, "weight_decay": 0.0}, {"params": thresholds}, {"params": rest}]

    def sgd(named):
        return torch.optim.SGD(groups(named), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)

    model, plain = network(), network()
    sparsifier = Sparsifier(model, STR(s_init=-4.0, interval=10))
    optimizer = sgd(dict(model.named_parameters()))
    sparsifier.attach(optimizer)

    weights = dict(plain.named_parameters())
    thresholds = {name: nn.Parameter(-4.0 * torch.ones(1, 1)) for name in SPARSE}
    other = weights | {name.replace("weight", "threshold"): s for name, s in thresholds.items()}

    def soft(name):
        w = weights[name]
        return torch.sign(w) * torch.relu(torch.abs(w) - torch.sigmoid(thresholds[name]))

    def forward(x):
        return torch.func.functional_call(plain, {name: soft(name) for name in SPARSE}, (x,))

    train_both(model, optimizer, other, sgd(other), forward, 100)
    assert all(torch.equal(sparsifier.masks[name], soft(name) != 0) for name in SPARSE)  # the 100th step reads them
    assert 0.5 < sparsifier.sparsity < 0.99


@pytest.mark.parametrize("unit", [1, 2])
def test_ac_dc_has_the_phases_masks_and_weights_of_its_program_to_the_bit(unit):
    """The ImageNet run of 100 epochs, of `unit` steps each: compressions and decompressions at the start of epochs."""
    compressions = {*range(10, 71, 10), *range(85, 100, 20)}
    decompressions = {*range(15, 66, 10), *range(75, 86, 20)}

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.875, weight_decay=1e-3)

    model, plain = network(), network()
    sparsifier = Sparsifier(model, ACDC(sparsity=0.9, begin=10 * unit, interval=5 * unit, end=85 * unit))
    optimizer = sgd(model)
    sparsifier.attach(optimizer)

    weights, its_optimizer = dict(plain.named_parameters()), sgd(plain)
    masks = {name: torch.ones_like(weights[name]) for name in SPARSE}
    total = sum(mask.numel() for mask in masks.values())
    seen = []

    @torch.no_grad()
    def after(t):
        if t % unit == 0 and t // unit in compressions:
            sizes = torch.cat([weights[name].abs().flatten() for name in SPARSE])
            least = sizes.sort(descending=True).values[floor(total * 0.1 + 0.5) - 1]
            for name in SPARSE:
                masks[name] = (weights[name].abs() >= least).float()
        if t % unit == 0 and t // unit in decompressions:
            for name in SPARSE:
                masks[name] = torch.ones_like(weights[name])
        for name in SPARSE:
            weights[name].mul_(masks[name])
            its_optimizer.state[weights[name]]["momentum_buffer"].mul_(masks[name])
        assert all(torch.equal(sparsifier.masks[name], masks[name].bool()) for name in SPARSE), t
        seen.append(sparsifier.sparsity > 0.5)

    def forward(x):  # gradients of pruned weights are zero
        for name in SPARSE:
            weights[name].grad = None
        return torch.func.functional_call(plain, {name: weights[name] * masks[name] for name in SPARSE}, (x,))

    train_both(model, optimizer, weights, its_optimizer, forward, 100 * unit, after)
    changes = [t + 1 for t in range(1, len(seen)) if seen[t] != seen[t - 1]]
    assert changes == [unit * epoch for epoch in sorted(compressions | decompressions)]


def test_grasp_scores_and_masks_are_those_of_its_program():
    """Two halves of the examples, in training mode: gradients summed up, then the gradient of their product."""
    model = network(torch.float64)
    halves = [(x.double(), y) for x, y in (batch(1, 20), batch(2, 20))]
    plain = copy.deepcopy(model)
    weights = [dict(plain.named_parameters())[name] for name in SPARSE]

    stopped = [torch.zeros_like(w) for w in weights]
    for x, y in halves:
        gradient = torch.autograd.grad(F.cross_entropy(plain(x) / 200, y), weights)
        stopped = [a + g for a, g in zip(stopped, gradient, strict=True)]
    for w in weights:
        w.grad = None
    for x, y in halves:
        gradient = torch.autograd.grad(F.cross_entropy(plain(x) / 200, y), weights, create_graph=True)
        sum((a * g).sum() for a, g in zip(stopped, gradient, strict=True)).backward(inputs=weights)
    scores = {name: -w.detach() * w.grad for name, w in zip(SPARSE, weights, strict=True)}
    everything = torch.cat([score.flatten() for score in scores.values()])
    scale = everything.sum().abs() + 1e-10
    n = floor(0.1 * everything.numel() + 0.5)  # the largest are removed, n stay
    most = (everything / scale).sort().values[n - 1]

    probe = Probe(model, halves)
    hg = probe.hessian_gradient({name: torch.ones_like(w, dtype=bool) for name, w in zip(SPARSE, weights, strict=True)})
    masks = Sparsifier(copy.deepcopy(model), GraSP(sparsity=0.9), probe=probe).masks
    for name, score in scores.items():
        own = -model.get_parameter(name).detach() * hg[name]
        assert torch.allclose(4 * own, score, rtol=1e-9, atol=1e-18)  # means over two halves, twice, beside sums
        assert torch.equal(masks[name], score / scale <= most)


@pytest.mark.parametrize(("rounds", "sparsity"), [(1, 0.5), (20, 0.98), (100, 0.99)])
def test_synflow_scores_and_masks_are_those_of_its_program(rounds, sparsity):
    """Absolute values of the whole state, an input of ones, and a new scoring of the masked network in every round."""
    model = network(torch.float64)
    with torch.no_grad():
        for norm in (model[1], model[5]):  # a network that was not just made
            norm.running_mean.normal_(std=0.01)
            norm.running_var.uniform_(0.5, 2)
            norm.bias.normal_(std=0.01)
    plain = copy.deepcopy(model).eval()
    state = plain.state_dict()
    weights = {name: dict(plain.named_parameters())[name] for name in SPARSE}
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    probe = Probe(model, example=torch.ones(1, 3, 8, 8))

    for t in range(1, rounds + 1):
        with torch.no_grad():
            for name, w in weights.items():
                w.mul_(masks[name])
            signs = {key: value.sign() for key, value in state.items()}
            for value in state.values():
                value.abs_()
        plain.zero_grad()
        effective = {name: masks[name] * w for name, w in weights.items()}
        torch.func.functional_call(plain, effective, (torch.ones(1, 3, 8, 8).double(),)).sum().backward()
        scores = {name: (w.grad * w).detach().abs() for name, w in weights.items()}
        with torch.no_grad():
            for key, value in state.items():
                value.mul_(signs[key])
        flow = probe.synaptic_flow({name: mask.bool() for name, mask in masks.items()})
        for name, score in scores.items():
            assert torch.allclose(flow[name] * masks[name], score, rtol=1e-10, atol=0)
        n = granet.distribution.budget(total, (1 - sparsity) ** (t / rounds))
        least = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values[n - 1]
        masks = {name: (score >= least).double() for name, score in scores.items()}

    found = Sparsifier(copy.deepcopy(model), SynFlow(sparsity=sparsity, rounds=rounds), probe=probe).masks
    assert all(torch.equal(found[name], mask.bool()) for name, mask in masks.items())
