"""Optimizers with 8-bit, float8 and 4-bit state, run on the CPU."""

import pytest
import torch
from torch import nn

import granet
from granet.sparsifier import masking, quantised, stepping


@pytest.fixture
def eager():
    """torchao compiles its step, which takes minutes here and changes nothing of what is asked."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def torchao(name):
    found = pytest.importorskip("torchao.optim", reason="needs pip install torchao")
    return getattr(found, name)


def bitsandbytes(name):
    found = pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
    return getattr(found.optim, name)


def train(make, steps=9):
    """Large enough for state in few bits: small parameters have float32 state in both libraries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, end=30, interval=4, distribution="uniform"))
    optimizer = make(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    x = torch.randn(steps, 16, 64)
    losses = []
    for batch in x:
        loss = (model(batch) - batch).square().mean()
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            if name in sparsifier.masks:
                held = [p.detach(), *stepping.buffers([optimizer], p)]
                assert not masking.leaks([(sparsifier.masks[name], held)])
    assert sparsifier.version == steps // 4 and losses[-1] < losses[0]
    return model, sparsifier, optimizer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("library", "name"),
    [(torchao, "AdamW8bit"), (torchao, "AdamWFp8"), (bitsandbytes, "AdamW8bit"), (bitsandbytes, "Lion8bit")],
)
def test_what_is_remembered_of_inactive_weights_is_zero(library, name, eager):
    model, _, optimizer = train(library(name))
    buffers = stepping.buffers([optimizer], model[0].weight)
    assert buffers and all(map(quantised.is_quantised, buffers))
    assert all(quantised.nonzero(buffer).any() for buffer in buffers)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("library", "name", "key"),
    [
        (torchao, "AdamW8bit", "exp_avg_sq"),
        (torchao, "AdamWFp8", "exp_avg_sq"),
        (bitsandbytes, "AdamW8bit", "state2"),
        (bitsandbytes, "RMSprop8bit", "state1"),
    ],
)
def test_a_grown_weight_has_a_second_moment_of_its_layers_size(library, name, key, eager):
    """Zero would make its first move several learning rates long."""
    model, sparsifier, optimizer = train(library(name), steps=7)
    old = sparsifier.masks["0.weight"].clone()
    x = torch.randn(16, 64)
    (model(x) - x).square().mean().backward()
    optimizer.step()
    new, state = sparsifier.masks["0.weight"], optimizer.state[model[0].weight]
    held = quantised.numbers(quantised.found(key, state[key], state))
    grown, others = held[new & ~old], held[new & old]
    assert len(grown) > 100 and (grown > 0).float().mean() > 0.99
    assert others.mean() / 1000 < grown.mean() < others.mean() * 1000


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_clearing_leaves_the_others_as_they_were(eager):
    model, _, optimizer = train(torchao("AdamW8bit"))
    state = optimizer.state[model[0].weight]["exp_avg"]
    before = state.dequantize()
    inactive = torch.rand(state.shape) < 0.5
    quantised.clear(state, inactive)
    assert not state.dequantize()[inactive].any()
    torch.testing.assert_close(
        state.dequantize()[~inactive], before[~inactive], rtol=0.1, atol=float(before.abs().max()) / 64
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_format_without_a_zero_is_refused(eager):
    with pytest.raises(ValueError, match="OptimState4bit cannot hold an exact zero"):
        train(torchao("AdamW4bit"))


def test_codes_of_an_unknown_table_are_refused():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"code": torch.zeros(3, 2, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"'code' is torch\.uint8"):
        stepping.buffers([optimizer], p)


def test_codes_are_cleared_to_that_of_zero():
    codes = torch.arange(6, dtype=torch.uint8).view(3, 2)
    state = {"state1": codes, "qmap1": torch.linspace(-1, 1, 5)}
    found = quantised.found("state1", codes, state)
    assert found.zero == 2
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    assert masking.leaks([(mask, [found])])
    masking.clear([(mask, [found])])
    assert codes.tolist() == [[0, 2], [2, 3], [2, 5]]
    assert not masking.leaks([(mask, [found])])
