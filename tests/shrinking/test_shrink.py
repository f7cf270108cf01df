import copy

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import granet
from granet.train.models import build


def statistics(model):
    """Running statistics and scales as after a training; biases of both signs, so that dead filters emit constants."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.5)
    return model


def kill(layer, *outputs):
    """Takes the weights of some outputs away; their biases stay."""
    with torch.no_grad():
        layer.weight[list(outputs)] = 0


def same(model, found, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(found.model.eval()(*inputs), model.eval()(*inputs), rtol=1e-9, atol=1e-9)


def conv(n_in, n_out, kernel=3, **options):
    return nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, **options)


def sequence(*layers):
    torch.manual_seed(0)
    return statistics(nn.Sequential(*layers)).double()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("name", "left"), [("resnet20", 0.6), ("vgg19", 0.3)])
def test_networks_with_dead_channels(name, left):
    torch.manual_seed(0)
    model = statistics(build(name, classes=10, in_channels=3)).double()
    granet.Sparsifier(model, granet.Static(sparsity=0.5, distribution="uniform"), pattern="channel")
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(1, 3, 32, 32).double()
    found = granet.shrink(model.train(), x)
    assert found.model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    same(model, found, x)
    assert found.multiply_adds[1] < left * found.multiply_adds[0]
    assert found.parameters == tuple(sum(p.numel() for p in one.parameters()) for one in (model, found.model))
    assert found.parameters[1] < left * found.parameters[0]
    shapes = {key: tuple(value.shape) for key, value in found.model.named_parameters()}
    assert all(shapes[layer.name] == layer.after for layer in found.layers)
    # and the small network trains like any other
    found.model.train()(torch.cat([x, -x])).sum().backward()


def test_the_report_counts_what_is_left():
    model = sequence(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    kill(model[0], 1, 5)
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.multiply_adds == (8 * 27 * 64 + 5120, 6 * 27 * 64 + 3840)
    assert str(found).splitlines() == [
        "layer       weight before  after    multiply-adds before   after   left",
        "-----------------------------------------------------------------------",
        "0.weight    8x3x3x3        6x3x3x3                13.8 k  10.4 k  75.0%",
        "4.weight    10x512         10x384                 5.12 k  3.84 k  75.0%",
        "all layers                                        18.9 k  14.2 k  75.0%",
        "parameters: 5.37 k before, 4.03 k after (75.0% left); "
        f"outputs deviate by {found.deviation:.2g} of the largest",
    ]


def test_constants_go_into_biases():
    model = sequence(conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 4, 1, bias=False), nn.ReLU(), conv(4, 2))
    kill(model[0], *range(5))
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.model[3].weight.shape == (4, 3, 1, 1) and found.model[3].bias is not None
    assert found.model[1].num_features == found.model[0].out_channels == 3


def test_one_constant_stays_in_front_of_padding():
    model = sequence(conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 4))
    kill(model[0], *range(5))
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.model[3].weight.shape == (4, 4, 3, 3)
    model[3].padding_mode = "reflect"  # the border is no longer zero
    model[3]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.model[3].weight.shape == (4, 3, 3, 3)


def test_channels_that_nobody_reads_go_back_through_the_network():
    model = sequence(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2))
    with torch.no_grad():
        model[6].weight[:, 2:] = 0
        model[4].weight[:2, 3:] = 0
        model[2].weight[:3, :4] = 0
    found = granet.shrink(model, X)
    same(model, found, X)
    assert [tuple(layer.after[:2]) for layer in found.layers] == [(4, 3), (3, 4), (2, 3), (2, 2)]


def test_a_dead_layer_keeps_one_channel():
    model = sequence(
        conv(3, 8), nn.ReLU(), conv(8, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    kill(model[0], *range(8))
    kill(model[2], *range(4))
    found = granet.shrink(model, X)
    same(model, found, X)
    assert [layer.after for layer in found.layers] == [(1, 3, 3, 3), (1, 1, 3, 3), (3, 1)]


class Depthwise(nn.Module):
    """An inverted residual block with squeeze and excitation, as in MobileNetV3."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Hardswish())
        self.expand = nn.Sequential(conv(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depth = nn.Sequential(conv(24, 24, groups=24, bias=False), nn.BatchNorm2d(24), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Sequential(conv(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y * gate)
        return self.head(x.mean((2, 3)))


def test_a_depthwise_network_with_gates():
    torch.manual_seed(0)
    model = statistics(Depthwise()).double()
    kill(model.expand[0], *range(12))
    kill(model.depth[0], *range(12))
    kill(model.squeeze, 0, 1)
    with torch.no_grad():
        # six of these twelve are zero in front of the gate, so that what the gate does is the same
        model.depth[1].bias[:6] = model.depth[1].running_mean[:6] * model.depth[1].weight[:6]
        model.depth[1].bias[:6] /= (model.depth[1].running_var[:6] + model.depth[1].eps).sqrt()
    found = granet.shrink(model, X)
    same(model, found, X)
    small = found.model
    assert small.depth[0].groups == small.depth[0].in_channels == small.expand[0].out_channels == 18
    assert small.squeeze.weight.shape == (4, 18, 1, 1) and small.excite.weight.shape == (18, 4, 1, 1)
    assert small.project[0].in_channels == 18


def test_groups_go_as_a_whole():
    model = sequence(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 2))
    kill(model[0], 0, 1, 2)
    kill(model[2], 0, 1, 2, 3)
    with torch.no_grad():
        model[0].bias[:3] = -1  # zero after ReLU
        model[2].bias[:4] = -1
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.model[2].groups == 3 and found.model[2].weight.shape == (9, 2, 3, 3)
    assert found.model[0].out_channels == 6 and found.model[4].in_channels == 9


class Dense(nn.Module):
    """Concatenations, as in DenseNet, of which one is flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = conv(3, 6), conv(6, 5), nn.BatchNorm2d(11)
        self.c, self.head = conv(11, 4), nn.Linear(16 * 15, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        both = torch.cat([a, torch.tanh(self.b(a))], 1)
        c = self.c(F.relu(self.norm(both)))
        return self.head(F.max_pool2d(torch.cat((c, both), dim=1), 2).flatten(1))


def test_concatenations():
    torch.manual_seed(0)
    model = statistics(Dense()).double()
    kill(model.a, 0, 2)
    kill(model.b, 1)
    kill(model.c, 3)
    found = granet.shrink(model, X)
    same(model, found, X)
    a, b, c = (layer.out_channels for layer in (found.model.a, found.model.b, found.model.c))
    assert c == 3 and a + b == 9  # one of the three constants stays, for the padding of c
    assert found.model.norm.num_features == 9 and found.model.head.in_features == 16 * 12


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = conv(3, 6), conv(6, 6), conv(6, 2, 1)

        def forward(self, x):
            x = torch.sigmoid(self.first(x))
            return self.last(torch.sigmoid(self.shared(torch.sigmoid(self.shared(x)))))

    torch.manual_seed(0)
    model = Twice().double()
    kill(model.first, 0, 1, 2)
    kill(model.shared, 0, 1)
    found = granet.shrink(model, X)
    same(model, found, X)


@pytest.mark.parametrize(
    "unknown",
    [
        lambda x: x.reshape(2, 512),
        lambda x: F.layer_norm(x, x.shape[1:]).flatten(1),
        lambda x: (x / x.shape[1]).flatten(1),
        lambda x: F.softmax(x, 1).flatten(1),
        lambda x: torch.stack(x.chunk(2, 1)).transpose(0, 1).flatten(1),
        lambda x: x.flip(1).flatten(1),
    ],
)
def test_what_enters_an_unknown_operator_is_kept(unknown):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = conv(3, 8, bias=False), nn.Linear(512, 3)

        def forward(self, x):
            return self.linear(unknown(self.conv(x)))

    torch.manual_seed(0)
    model = Model().double()
    kill(model.conv, 0, 1)
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.parameters[0] == found.parameters[1]


@pytest.mark.parametrize(
    "known",
    [
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.reshape(x.size(0), -1),
        lambda x: (2 * x + 0.5 - 1 / 2).flatten(1),
        lambda x: torch.flatten(F.dropout(x, 0.5, False), 1),
        lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).flatten(1),
        lambda x: (x - x * x).clamp(min=-1.0).contiguous().flatten(start_dim=1),
    ],
)
def test_operators_that_channels_are_followed_through(known):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = conv(3, 8), nn.Linear(512, 3)

        def forward(self, x):
            return self.linear(known(self.conv(x)))

    torch.manual_seed(0)
    model = Model().double()
    kill(model.conv, 0, 1)
    found = granet.shrink(model, X)
    same(model, found, X)
    assert found.model.conv.out_channels == 6 and found.model.linear.in_features == 384


def test_tied_pruned_and_parametrized_weights_are_kept():
    tied = sequence(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2))
    tied[4].weight = tied[2].weight
    kill(tied[0], 0)
    kill(tied[2], 1)
    pruned = sequence(conv(3, 8, bias=False), nn.ReLU(), conv(8, 2))
    prune.custom_from_mask(pruned[0], "weight", (torch.arange(8) > 1).reshape(-1, 1, 1, 1).expand(8, 3, 3, 3))
    normed = sequence(conv(3, 8, bias=False), nn.ReLU(), conv(8, 2))
    parametrizations.weight_norm(normed[0])
    with pytest.raises(ValueError, match=r"call prune\.remove"):
        granet.shrink(pruned, X)
    for model in (tied, normed):
        found = granet.shrink(model, X)
        same(model, found, X)
        assert found.parameters[0] == found.parameters[1]
    prune.remove(pruned[0], "weight")
    assert granet.shrink(pruned, X).model[0].out_channels == 6


def test_effective_weights_of_a_method_are_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    granet.Sparsifier(model, granet.TopKAST(sparsity=0.9))
    x = torch.randn(4, 8)
    found = granet.shrink(model, x)
    torch.testing.assert_close(found.model(x), model(x))
    assert found.model[0].out_features < 6 and type(found.model[0]) is nn.Linear


def test_sequences_of_features():
    model = sequence(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    kill(model[0], 1, 3)
    kill(model[2], 0)
    x = torch.randn(2, 5, 6).double()
    found = granet.shrink(model, x)
    same(model, found, x)
    assert [layer.after for layer in found.layers] == [(8, 6), (9, 8), (4, 9)]


def test_models_that_cannot_be_followed():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the model"):
        granet.shrink(Branches(), X)
    with pytest.raises(ValueError, match="the example is None: give a tensor"):
        granet.shrink(nn.Linear(2, 2), None)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=15, deadline=None)
def test_random_networks(data):
    """Any chain of layers with any channels dead, a shortcut around part of it, computes what it did."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    width = data.draw(st.sampled_from([4, 6]))

    def block():
        kind = data.draw(st.sampled_from(["conv", "pointwise", "depthwise", "groups"]))
        options = {"groups": {"depthwise": width, "groups": 2}.get(kind, 1), "bias": data.draw(st.booleans())}
        layer = conv(width, width, 1 if kind == "pointwise" else 3, **options)
        kill(layer, *data.draw(st.sets(st.integers(0, width - 1))))
        if data.draw(st.booleans()):
            with torch.no_grad():
                layer.weight[:, list(data.draw(st.sets(st.integers(0, layer.weight.shape[1] - 1))))] = 0
        act = data.draw(st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Hardswish, nn.Identity]))()
        pool = data.draw(st.sampled_from([nn.Identity(), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)]))
        return nn.Sequential(layer, *([nn.BatchNorm2d(width)] if data.draw(st.booleans()) else []), act, pool)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(3, width)
            self.bodies = nn.ModuleList(
                nn.Sequential(*(block() for _ in range(data.draw(st.integers(1, 3))))) for _ in range(2)
            )
            self.join, self.head = data.draw(st.sampled_from(["add", "mul", "cat"])), None
            self.head = nn.Linear(width * (2 if self.join == "cat" else 1), 3)

        def forward(self, x):
            x = F.relu(self.stem(x))
            a, b = self.bodies[0](x), self.bodies[1](x)
            y = torch.cat([a, b], 1) if self.join == "cat" else a + b if self.join == "add" else a * b
            return self.head(y.mean((2, 3)))

    model = statistics(Net()).double()
    found = granet.shrink(model, X)
    same(model, found, X)
    with torch.no_grad():
        other = 10 * torch.randn(3, 3, 5, 7).double()
        torch.testing.assert_close(found.model.eval()(other), model.eval()(other), rtol=1e-8, atol=1e-8)
