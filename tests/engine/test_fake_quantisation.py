"""Quantisation-aware training rounds as the int8 engine does, and leaves parameters, masks and state dicts alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import granet
from granet.engine.fake_quantisation import MOMENTUM
from granet.engine.precision import int8_format, quantised_weight
from granet.engine.quantise import best_range, fake_quantised, relative_error, sampled

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (6, 24)),
    "linear over tokens": (lambda: nn.Linear(24, 10, bias=False), (2, 3, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 15)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), (2, 8, 9, 9)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    )  # fmt: skip


def rounded(weight):
    quantised, scale = quantised_weight(weight.detach())
    return quantised * scale.view(-1, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_the_numbers_of_the_engine(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    layer, x = make(), torch.randn(shape)
    twin = copy.deepcopy(layer)
    handle = granet.fake_quantise(layer)
    found = layer(x)
    form = int8_format(*best_range(sampled(x)).tolist())
    with torch.no_grad():
        twin.weight.copy_(rounded(twin.weight))
    expected = twin(fake_quantised(x, form))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, make().to(x)(x), rtol=1e-4, atol=1e-5)
    handle.remove()
    assert "forward" not in layer.__dict__


def test_in_the_same_ranges_the_network_computes_what_the_engine_computes(monkeypatch):
    from granet.engine import search, timing

    monkeypatch.setattr(timing, "NOISE", -1e9)
    monkeypatch.setattr(search, "ROUNDS", 1)
    model, x = network().eval(), torch.randn(16, 8, 8, 8)
    fast = granet.compile(model, x, precision="int8", calibration=[x])
    assert fast.report().precision == "int8"
    with torch.no_grad():
        expected = fast(x)
        assert relative_error(model(x), expected) > 5e-3
        ranges = {str(i): best_range(sampled(model[:i](x))) for i in (0, 2, 5)}
        handle = granet.fake_quantise(model)
        handle.load_state_dict(ranges)
        assert relative_error(model(x), expected) < 1e-3


def test_batch_norm_may_be_folded_before_or_after_rounding():
    torch.manual_seed(2)
    weight, factor = torch.randn(6, 4, 3, 3), torch.randn(6)[:, None, None, None]
    torch.testing.assert_close(rounded(weight * factor), rounded(weight) * factor, rtol=1e-5, atol=1e-6)


def test_masks_stay_exact_and_gradients_reach_every_weight():
    model = network()
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.8))
    with torch.no_grad():
        model[2].weight[3] = 0.0  # a filter without active weights
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    granet.fake_quantise(model)
    assert list(model.state_dict()) == keys and model[2].weight is dict(model.named_parameters())["2.weight"]
    before = model[0].weight.detach().clone()
    for _ in range(3):
        loss = F.cross_entropy(model(torch.randn(16, 8, 8, 8)), torch.arange(16) % 10)
        loss.backward()
        assert loss.isfinite() and (model[0].weight.grad != 0).any()
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, masks[name])
        assert not (dict(model.named_parameters())[name][~mask] != 0).any()
    assert not torch.equal(model[0].weight, before)
    sparsifier.verify()


def test_ranges_are_averaged_in_training_and_kept_in_evaluation():
    layer, (a, b) = nn.Linear(4, 2), (torch.rand(64, 4), 3 * torch.rand(64, 4))
    handle = granet.fake_quantise(layer)
    assert handle.ranges.isnan().all()
    layer(a)
    first = handle.ranges.clone()
    assert torch.equal(first[0], best_range(sampled(a)))
    layer(b)
    torch.testing.assert_close(handle.ranges[0], first[0].lerp(best_range(sampled(b)), MOMENTUM))
    seen = handle.ranges.clone()
    layer.eval()(b)
    with torch.no_grad():
        layer.train()(b)
    assert torch.equal(handle.ranges, seen)
    x = torch.tensor([[0.5, 0.5, 100.0, 0.5]], requires_grad=True)  # beyond the range: no gradient
    layer.eval()(x).sum().backward()
    assert x.grad[0, 2] == 0 and (x.grad[0, [0, 1, 3]] != 0).all()


def test_state_is_given_and_taken():
    one, other = network(), network()
    handles = [granet.fake_quantise(model) for model in (one, other)]
    one(torch.randn(16, 8, 8, 8))
    handles[1].load_state_dict(handles[0].state_dict())
    assert torch.equal(handles[0].ranges, handles[1].ranges) and not handles[0].ranges.isnan().any()
    one(torch.randn(16, 8, 8, 8))
    assert not torch.equal(handles[0].ranges, handles[1].ranges)
    with pytest.raises(ValueError, match=r"the ranges are those of 0, 2, 5, and this model rounds 0, 2$"):
        granet.fake_quantise(network()[:4]).load_state_dict(handles[0].state_dict())


def test_copies_round_as_the_model_does():
    model, x = network(), torch.randn(16, 8, 8, 8)
    average = copy.deepcopy(model).eval()
    handle = granet.fake_quantise(model)
    handle.follow(average)
    model(x)
    assert torch.equal(average(x), model.eval()(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    plain = network().eval()
    handle.remove()
    for one in (model, average):
        assert torch.equal(one(x), plain(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_no_number_is_made_of_nan(bad, training):
    layer, x = nn.Linear(4, 2), torch.rand(64, 4)
    granet.fake_quantise(layer)
    layer(x)
    x[5, 1] = bad
    assert layer.train(training)(x)[5].isnan().all()


def test_effective_weights_are_what_is_rounded():
    layer = nn.Linear(16, 8)
    sparsifier = granet.Sparsifier(layer, granet.STR(s_init=-2.0))
    granet.fake_quantise(layer)
    x = torch.rand(32, 16)
    effective = sparsifier.plain_state_dict()["weight"]
    found, form = layer(x), int8_format(*best_range(sampled(x)).tolist())
    torch.testing.assert_close(found, F.linear(fake_quantised(x, form), rounded(effective), layer.bias))


class Doubled(nn.Linear):
    """A layer that computes in a way of its own."""

    def forward(self, x):
        """Returns twice the linear layer's output."""
        return 2 * super().forward(x)


def test_what_cannot_be_rounded_is_said(caplog):
    with pytest.raises(TypeError, match=r"the model is the text 'x', and a torch.nn.Module is needed"):
        granet.fake_quantise("x")
    with pytest.raises(ValueError, match="unknown precision of quantisation-aware training 'int4': choose from int8"):
        granet.fake_quantise(network(), "int4")
    with pytest.raises(ValueError, match="ReLU has no linear or convolutional layer"):
        granet.fake_quantise(nn.ReLU())
    with pytest.raises(ValueError, match="'0' computes in float64"):
        granet.fake_quantise(network().double())
    model = network()
    granet.fake_quantise(model)
    with pytest.raises(ValueError, match="the forward of '0' was exchanged already"):
        granet.fake_quantise(model)
    assert granet.fake_quantise(nn.Sequential(Doubled(4, 2), nn.Linear(2, 2))).names == ("1",)
    assert "not rounded, because they compute in a way of their own: 0" in caplog.text
