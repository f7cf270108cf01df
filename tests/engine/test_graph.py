"""Graphs of any form are lowered to segments and the nodes between them."""

import pytest
import torch
from small_models import close, sparse
from torch import nn

from granet.engine import inference
from granet.engine.graph import tensors_of


class Attention(nn.Module):
    """A layer of a transformer: operators the kernels do not know between linears they do."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(nn.functional.relu(self.up(x)))


class TokenNorm(nn.Module):
    """Batch-norm over the tokens of as many tokens as features: not the axis that the linear layer's channels are."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)

    def forward(self, x):
        return self.norm(self.linear(x))


class Unusual(nn.Module):
    """Conv1d, a branch used twice, and a convolution the kernels do not support."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, padding=1)
        self.circular = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.three = nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2)

    def forward(self, x):
        y = torch.relu(self.one(x))
        z = self.circular(y) + y
        return {"a": self.three(z), "b": (y, z.sum())}


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Attention(), torch.randn(2, 10, 64)),
        (Unusual(), torch.randn(3, 6, 21)),
        (TokenNorm(), torch.randn(3, 24, 24)),
    ],
    ids=["linear", "conv1d", "tokens"],
)
def test_models_with_unsupported_parts(model, x, monkeypatch):
    monkeypatch.setattr("granet.engine.timing.NOISE", -1e9)  # take the compiled model whether it wins or not
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fast = inference.compile(model, x)
    assert fast.report().chosen == "sparse"
    expected, found = tensors_of([model(x)]), tensors_of([fast(x)])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a.detach(), atol=1e-4, rtol=1e-4)


class PreAct(nn.Module):
    """An in-place activation changes what the skip connection adds afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        return self.c(self.relu(self.b(self.relu(x)))) + x


class Statement(PreAct):
    def forward(self, x):
        h = self.a(x)
        h.relu_()
        return self.b(h)


@pytest.mark.parametrize("kind", [PreAct, Statement])
@pytest.mark.parametrize("example", [torch.zeros, torch.randn])
def test_in_place_activations(kind, example, always):
    model, x = sparse(kind()), torch.randn(2, 8, 6, 6)
    fast = inference.compile(model, example(2, 8, 6, 6))
    assert fast.report().chosen == "sparse"
    close(fast(x), model(x).detach())


class Conditional(nn.Module):
    """Torch computes the embedding after the segment that it enters has begun."""

    def __init__(self):
        super().__init__()
        self.fc, self.emb, self.out = nn.Linear(16, 24), nn.Embedding(10, 24), nn.Linear(24, 10)

    def forward(self, x, c):
        return self.out((self.fc(x) + self.emb(c)).relu())


class Skip(nn.Module):
    """A dropout of a segment's input is used after the segment."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.sigmoid(h)) + self.drop(x), self.drop(x), x.contiguous()


class Forms(Skip):
    def forward(self, xs, *, mask=None, more=None):
        h = self.a(input=xs[0]) + xs[1]["y"]
        h = h if mask is None else h * mask
        return {"out": self.b(h), "more": None if more is None else [more, h]}


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Conditional(), (torch.randn(4, 16), torch.randint(0, 10, (4,)))),
        (Skip(), (torch.randn(4, 16),)),
        (Forms(), ([torch.randn(4, 16), {"y": torch.randn(4, 16)}],)),
        (Forms(), {"xs": [torch.randn(4, 16), {"y": torch.randn(4, 16)}], "mask": torch.rand(16)}),
        (Forms(), {"xs": (torch.randn(4, 16), {"y": torch.randn(4, 16)}), "more": 3}),
    ],
    ids=["integers", "aliases", "nest", "keywords", "numbers"],
)
def test_arguments_and_results_of_any_form(model, inputs, always):
    fast = inference.compile(sparse(model), inputs)
    args, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    assert fast.report(*args, **named).chosen == "sparse"
    with torch.no_grad():
        close(fast(*args, **named), model(*args, **named))


def test_monte_carlo_dropout_stays_random(always):
    model, x = sparse(nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 8))), torch.randn(4, 16)
    model[1].train()
    fast = inference.compile(model, x)
    torch.manual_seed(1)
    first, second = fast(x), fast(x)
    torch.manual_seed(1)
    close(first, model(x).detach())
    assert not torch.equal(first, second)
