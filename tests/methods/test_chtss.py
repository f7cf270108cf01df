"""Cannistraci-Hebb training equals a naive version of it: plain loops over weights, and over the paths of the graph."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import granet
from granet import CHTss, Sparsifier
from granet.criterion import Layer
from granet.topology import count
from path_oracle import naive_score, neighbours

CHT = {"initial_sparsity": None, "soft": False, "predictor": "ch3-l3p", "anneal": False}


def keep(mask, scores, n):
    """The `n` highest scores in a mask, the earlier of equals first."""
    best = sorted(np.flatnonzero(mask), key=lambda i: (-scores.flat[i], i))[:n]
    return np.isin(np.arange(mask.size), best).reshape(mask.shape)


def naive_importance(weight, relative):
    """The magnitude over `1 - relative` plus the share `relative` of the sum over its output, and the same by input."""
    flat = np.abs(weight.reshape(len(weight), -1)).astype(np.float64)
    out = np.zeros(flat.shape)
    for i, j in np.argwhere(flat):
        out[i, j] = flat[i, j] / (1 - relative + relative * flat[i].sum())
        out[i, j] += flat[i, j] / (1 - relative + relative * flat[:, j].sum())
    return out.reshape(weight.shape)


def naive_exchange(mask, weight, share, relative, predictor):
    """Without randomness: the least important go, the likeliest come, both by position where they are equal."""
    active = int(mask.sum())
    n = math.floor(round(share * active, 9))
    if active == mask.size:
        return mask
    kept = keep(mask, naive_importance(weight, relative).astype("f"), active - n)
    near, scores = neighbours(torch.from_numpy(kept)), np.zeros(mask.shape, "f")
    flat = scores.reshape(len(scores), -1)
    for i, j in np.argwhere(~kept.reshape(len(kept), -1)).tolist():
        flat[i, j] = naive_score(near, ("out", i), ("in", j), predictor)
    return kept | keep(~kept, scores, n)


@pytest.mark.parametrize("relative", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("predictor", ["ch3-l3p", "ch2-l3n"])
@pytest.mark.parametrize("anneal", [True, False])
def test_cht(case, predictor, anneal, relative):
    weights, _, masks, layers, given = case
    method = CHTss(
        **CHT
        | {"predictor": predictor, "anneal": anneal, "relative_importance": relative, "sparsity": 0.5, "end": 100},
        interval=10,
    )
    share = 0.3 * (1 + math.cos(math.pi * 0.4)) / 2 if anneal else 0.3
    got = method.update(40, layers, given, torch.Generator())
    for name, mask in masks.items():
        assert got[name].tolist() == naive_exchange(mask, weights[name], share, relative, predictor).tolist()


def test_density_decay_keeps_the_largest_relative_importance(case):
    """At the end of the decay nothing is exchanged: what is left are the best active weights of every layer."""
    weights, _, masks, layers, given = case
    given = {name: torch.ones_like(mask) for name, mask in given.items()}  # as many as it starts with
    method = CHTss(sparsity=0.75, initial_sparsity=0.0, end=50, interval=20)
    assert [step for step in range(100) if method.is_update(step)] == [20, 40, 50]
    got = method.update(50, layers, given, torch.Generator())
    for name, n in method.final_counts({name: mask.shape for name, mask in masks.items()}).items():
        score = naive_importance(weights[name], 1.0).astype("f")
        assert count(got[name]) == n
        assert got[name].tolist() == keep(np.ones(score.shape, bool), score, n).tolist()


def test_sampling_prefers_what_the_hard_rule_takes():
    """Often drawn: large weights stay, and likely links come; neither always. Probabilities are those of the scores."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    method = CHTss(sparsity=0.5, initial_sparsity=None, end=1_000_000, interval=1, drop_fraction=0.4, anneal=False)
    stayed, times = torch.zeros(2, 3), 1000
    for _ in range(times):  # of three weights one goes
        after = method.update(1, {"a": Layer(weight)}, {"a": weight != 0}, rng)["a"]
        assert count(after) == 3
        stayed += after
    # the first weight goes if the other two are drawn first: 2/6 * 1/4 + 1/6 * 2/5. It comes back if it is predicted
    # from 2.0 and 1.0, which share no path: all four places have a score of zero, so it is one of four
    goes = 2 / 6 * 1 / 4 + 1 / 6 * 2 / 5
    assert float(stayed[0, 0]) / times == pytest.approx(1 - goes * 3 / 4, abs=0.03)  # three standard deviations


def test_sharpness_rises_along_a_line():
    method = CHTss(sparsity=0.9, end=100)
    assert [method.sharpness_at(step) for step in (0, 50, 100, 200)] == [1.0, 5.0, 9.0, 9.0]


def test_no_gradient_is_looked_at_and_the_gradient_of_inactive_weights_may_be_anything():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    sparsifier = Sparsifier(model, CHTss(sparsity=0.9, end=20, interval=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for _ in range(25):
        nn.functional.cross_entropy(model(torch.randn(8, 20)), torch.randint(5, (8,))).backward()
        for name, mask in sparsifier.masks.items():
            model.get_parameter(name).grad[~mask] = float("nan")
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.active == granet.distribution.budget(750, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_sparsity": 0.95}, "must not exceed"),
        ({"soft": False, "sharpness": 2.0}, "soft=True"),
        ({"soft": False, "final_sharpness": 2.0}, "soft=True"),
        ({"predictor": "ch2-l3"}, "predictor"),
        ({"relative_importance": 1.5}, "relative_importance"),
        ({"receptive_field": -0.5}, "receptive_field"),
        ({"final_sharpness": float("inf")}, "final_sharpness"),
        ({"sharpness": -1.0}, "sharpness"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CHTss(**{"sparsity": 0.9, "end": 10, **settings})
