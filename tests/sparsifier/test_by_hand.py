"""Loops that call `before_step` and `after_step` themselves: a call that is left out, or is one too many, is said."""

import warnings

import pytest
import torch
from small_training import granet_method, three_layers
from torch import nn

import granet
from granet import Sparsifier


def training(hooks=False, kind=torch.optim.Adam, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
    sparsifier = Sparsifier(model, granet.RigL(**{"sparsity": 0.8, "end": 100, "interval": 5} | settings))
    optimizer = kind(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer, hooks=hooks)
    return model, sparsifier, optimizer


def backward(model):
    model.zero_grad()
    model(torch.randn(8, 20)).square().mean().backward()


def test_a_loop_that_calls_neither_is_told_once():
    model, _, optimizer = training()
    backward(model)
    with pytest.warns(RuntimeWarning, match=r"Adam, attached with hooks=False, has stepped without before_step\(\)"):
        optimizer.step()
    for _ in range(3):
        backward(model)
        optimizer.step()


def test_a_loop_that_never_calls_after_step_is_told_at_the_second_step():
    model, sparsifier, optimizer = training()
    for told in (False, True, False):
        backward(model)
        sparsifier.before_step()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert ["stepped without after_step()" in str(one.message) for one in said] == [True] * told


def test_after_step_without_before_step_is_an_error():
    model, sparsifier, optimizer = training()
    for _ in range(2):
        backward(model)
        sparsifier.before_step()
        optimizer.step()
        sparsifier.after_step()
    with pytest.raises(RuntimeError, match=r"without before_step\(\)"):
        sparsifier.after_step()
    assert sparsifier.step == 2


@pytest.mark.parametrize("verb", ["before_step", "after_step"])
def test_calls_beside_hooks_are_errors_and_no_step_counts_twice(verb):
    model, sparsifier, optimizer = training(hooks=True)
    backward(model)
    with pytest.raises(RuntimeError, match=rf"{verb}\(\) was called, and attach\(optimizer\) has hooked"):
        getattr(sparsifier, verb)()
    optimizer.step()
    assert sparsifier.step == 1


def test_loops_that_skip_a_step_or_attach_anew_or_mix_weights_are_told_nothing():
    model, sparsifier, optimizer = training(kind=torch.optim.Adamax)
    for step in range(12):
        backward(model)
        sparsifier.before_step()
        if step == 3:  # as where a gradient scaler has found an overflow
            continue
        optimizer.step()
        sparsifier.after_step()
        if step == 6:
            sparsifier.detach()
            sparsifier.attach(optimizer, hooks=False)
    assert sparsifier.step == 11 and sparsifier.version == 2


def test_a_sparsifier_keeps_its_method():
    model, sparsifier, optimizer = training(hooks=True)
    pruning = granet.GMP(sparsity=0.9, end=10, interval=2)
    with pytest.raises(AttributeError, match=r"keeps its method.* masks=sparsifier.masks"):
        sparsifier.method = pruning
    sparsifier.detach()
    other = Sparsifier(model, pruning, masks=sparsifier.masks)  # as the message says
    other.attach(optimizer)
    for _ in range(12):
        backward(model)
        optimizer.step()
    assert other.sparsity == pytest.approx(0.9, abs=0.01)


def test_an_update_that_cannot_be_made_for_long_is_said_once():
    model, sparsifier, optimizer = training(hooks=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(20):
            if step in (4, 5, 6, 9):
                model.zero_grad()
            else:
                backward(model)
            optimizer.step()
    messages = [str(one.message).partition(":")[0] for one in said]
    text = "topology update at step {} skipped, to be tried again at each of the next"
    assert messages == [text.format(5), text.format(10)]
    assert sparsifier.last_update.step == 20


def test_the_explicit_verbs_give_what_the_hooks_give():
    models = []
    for hooks in (True, False):
        model = three_layers()
        sparsifier = Sparsifier(model, granet_method())
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier.attach(optimizer, hooks=hooks)
        for step in range(30):
            model(torch.randn(16, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            if not hooks:
                sparsifier.before_step()
            optimizer.step()
            if not hooks:
                sparsifier.after_step()
            optimizer.zero_grad()
        assert sparsifier.step == 30
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
