"""Growth by one gradient, by the mean of several, by their exponential mean, or at random."""

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from torch import nn

from granet import DeepR, GraNet, RigL, Sparsifier
from granet.criterion import Layer
from granet.topology import count, seeds, some

STEPS = 30


class Spy:
    """A linear layer in training under SGD; notes at every step the dense gradient and what the step kept of it."""

    def __init__(self, method, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Linear(30, 20, bias=False, dtype=dtype)
        self.sparsifier = Sparsifier(self.model, method)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.sparsifier.attach(optimizer, hooks=False)
        self.due, self.grads, self.masks, self.weights = [], [], [self.sparsifier.masks["weight"]], []
        self.states = []  # of the topology's random generator, before each step
        for step in range(1, STEPS + 1):
            self.states.append(self.sparsifier._rng.get_state())
            rng = torch.Generator().manual_seed(step)
            self.model(torch.randn(8, 30, generator=rng).to(dtype)).square().mean().backward()
            self.due.append(self.sparsifier.dense_grad_due)
            self.grads.append(self.model.weight.grad.clone())
            self.sparsifier.before_step()
            optimizer.step()
            self.weights.append(self.model.weight.detach().clone())
            self.sparsifier.after_step()
            self.masks.append(self.sparsifier.masks["weight"].clone())
            optimizer.zero_grad()

    def expected(self, at, ratio, score):
        """The mask after the update at step `at`, growth by `score`."""
        mask = self.masks[at - 1]
        active = count(mask)
        n = floor(Fraction(str(round(ratio, 12))) * active)
        worst = sorted(
            mask.flatten().nonzero().flatten().tolist(), key=lambda i: self.weights[at - 1].flatten()[i].abs()
        )
        kept = mask.clone().flatten()
        kept[worst[:n]] = False
        best = sorted((~kept).nonzero().flatten().tolist(), key=lambda i: -score.flatten()[i].abs())
        kept[best[:n]] = True
        return kept.view_as(mask)


METHODS = {
    "rigl": lambda **more: RigL(sparsity=0.8, end=40, interval=8, **more),
    "granet": lambda **more: GraNet(
        sparsity=0.8, initial_sparsity=0.8, end=3, total=STEPS, interval=8, regeneration=0.3, **more
    ),
}
each = pytest.mark.parametrize("name", METHODS)


@each
@pytest.mark.parametrize("n", [1, 3, 8])
def test_growth_looks_at_the_mean_of_the_steps_up_to_the_update(name, n):
    method = METHODS[name](accumulate=n)
    run = Spy(method)
    updates = [step for step in range(1, 2 * STEPS) if method.is_update(step)]
    assert [s + 1 for s, due in enumerate(run.due) if due] == sorted(
        {s for u in updates for s in range(u - n + 1, u + 1) if 0 < s <= STEPS}
    )
    for at in (8, 16, 24):
        since = max([at - n, *(step for step in updates if step < at)])  # gradients of one topology alone
        mean = torch.stack(run.grads[since:at]).mean(0)
        want = run.expected(at, method.regeneration_at(at), mean)
        assert torch.equal(run.masks[at], want)
        assert not torch.equal(want, run.masks[at - 1])


@each
def test_momentum_is_the_exponential_mean_of_every_step(name):
    method = METHODS[name](growth="momentum")
    run = Spy(method)
    mean = 0.1 * run.grads[0]
    for step in range(2, STEPS + 1):
        mean = 0.9 * mean + 0.1 * run.grads[step - 1]
        if step in (8, 16, 24):
            assert torch.equal(run.masks[step], run.expected(step, method.regeneration_at(step), mean))
    assert run.due == [step <= method.last_growth for step in range(1, STEPS + 1)]  # nothing is kept in vain
    assert method.last_growth == {"rigl": 32, "granet": 24}[name]


@each
def test_random_growth_never_asks_for_a_dense_gradient(name):
    method = METHODS[name](growth="random")
    assert not method.needs_dense_grad and METHODS[name]().needs_dense_grad
    run = Spy(method)
    assert not any(run.due)
    grown = run.masks[8] & ~run.masks[7]
    assert count(grown) and count(run.masks[8]) == count(run.masks[7])
    assert not torch.equal(run.masks[8], Spy(METHODS[name]()).masks[8])


@each
@pytest.mark.parametrize("growth", ["gradient", "momentum", "explore"])
def test_a_method_that_exchanges_nothing_never_asks_for_a_dense_gradient(name, growth):
    share = {"rigl": "drop_fraction", "granet": "regeneration"}[name]
    method = replace(METHODS[name](growth=growth), **{share: 0.0})
    assert not method.needs_dense_grad and method.last_growth == 0
    run = Spy(method)
    assert not any(run.due)
    assert not any((run.masks[step] & ~run.masks[step - 1]).any() for step in range(1, STEPS + 1))
    assert count(run.masks[STEPS]) == count(Spy(METHODS[name](growth=growth)).masks[STEPS])


@each
@pytest.mark.parametrize("explored", [0.5, 1.0, 50.0])
def test_exploration_grows_the_largest_gradients_of_the_drawn_weights(name, explored):
    method = METHODS[name](growth="explore", explored=explored)
    run = Spy(method)
    assert method.needs_dense_grad and run.due == [method.is_update(step) for step in range(1, STEPS + 1)]
    for at in (8, 16, 24):
        before, weight, grad = (x.flatten() for x in (run.masks[at - 1], run.weights[at - 1], run.grads[at - 1]))
        rng = torch.Generator().set_state(run.states[at - 1])
        drawn = some(run.masks[at - 1], explored, seeds(["weight"], rng)["weight"]).flatten()
        assert count(drawn) == min(floor(explored * count(before)), count(~before)) and not (drawn & before).any()
        n = min(floor(Fraction(str(round(method.regeneration_at(at), 12))) * count(before)), count(drawn))
        lost = sorted(before.nonzero().flatten().tolist(), key=lambda i: weight[i].abs())[:n]
        grown = sorted(drawn.nonzero().flatten().tolist(), key=lambda i: -grad[i].abs())[:n]
        want = before.clone()
        want[lost], want[grown] = False, True
        assert n and torch.equal(run.masks[at].flatten(), want)


def test_exploration_takes_no_pattern():
    with pytest.raises(
        ValueError, match="RigL decides about single weights in its own way and cannot obey pattern 2:4"
    ):
        Sparsifier(nn.Linear(32, 32), METHODS["rigl"](growth="explore"), pattern="2:4")


def test_gradients_of_half_precision_are_averaged_in_float32():
    run = Spy(METHODS["rigl"](accumulate=8), torch.bfloat16)
    mean = torch.stack([grad.float() for grad in run.grads[:8]]).mean(0)
    assert torch.equal(run.masks[8], run.expected(8, METHODS["rigl"]().regeneration_at(8), mean))


@each
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"growth": "gradeint"}, "did you mean 'gradient'"),
        ({"accumulate": 9}, "accumulate=9 is more than the interval=8"),
        ({"accumulate": 0}, "accumulate=0 is not a positive"),
        ({"accumulate": 2, "growth": "random"}, "accumulate=2 requires growth="),
        ({"accumulate": 2, "growth": "explore"}, "accumulate=2 requires growth="),
        ({"explored": 0.0, "growth": "explore"}, "explored=0.0 must be a finite number above 0"),
        ({"explored": 2.0}, "explored=2.0 has an effect with growth=\"explore\", not 'gradient'"),
    ],
)
def test_nonsense_is_refused(name, more, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](**more)


def test_deep_rs_noise_is_finite_for_every_score(monkeypatch):
    """The largest score is one in 2**24: rare enough for a test by chance, not for a training."""
    scores = torch.tensor([[0.0, 0.5, 1 - 2**-24]])
    monkeypatch.setattr("granet.topology.random_scores", lambda tensor, rng: scores)
    layer = Layer(torch.full((1, 3), 9.0))
    change = DeepR(sparsity=0.5, temperature=1.0).drift(1, {"w": layer}, {}, None, {"w": 1.0}, {})["w"]
    assert change.isfinite().all()
    assert change[0, 0] < change[0, 1] < change[0, 2]
