"""SNIP, GraSP and SynFlow against naive versions in NumPy, ties included, and what they leave of real networks."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from granet import SNIP, GraSP, Probe, Sparsifier, SynFlow, distribution
from granet.criterion import Layer
from granet.topology import count

SIZES = (4, 6, 5)  # inputs, hidden, outputs of a linear network with two layers


class Linear2(nn.Module):
    """f(x) = W2 W1 x in float64."""

    def __init__(self, weights):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.from_numpy(w.copy())) for w in weights)

    def forward(self, x):
        return x @ self.w1.T @ self.w2.T


def half_squares(output, targets):
    return (output - targets).square().sum() / 2


def case(seed, ties):
    """Weights and examples in whole numbers, so that scores are exact: a hidden unit with one weight on each side has
    equal scores there (a conservation law), and small numbers make many more ties."""
    rng = np.random.default_rng(seed)
    largest = 2 if ties else 20

    def draw(*shape):
        return rng.integers(-largest, largest + 1, shape).astype(float)

    a, b, c = SIZES
    weights = [draw(b, a), draw(c, b)]
    x, y = draw(3, a), draw(3, c)
    model = Linear2(weights)
    probe = Probe(model, [(torch.from_numpy(x), torch.from_numpy(y))], half_squares)
    layers = {"w1": Layer(model.w1.detach()), "w2": Layer(model.w2.detach())}
    return weights, x.T, y.T, layers, probe


def gradient(w, x, y, temperature=1.0):
    """Of half the sum of (W2 W1 x / T - y) ** 2."""
    rest = w[1] @ w[0] @ x / temperature - y
    return [w[1].T @ rest @ x.T / temperature, rest @ (w[0] @ x).T / temperature]


def hessian_gradient(w, x, y, temperature):
    """The derivative of the gradient along the gradient, by the product rule."""
    v = gradient(w, x, y, temperature)
    rest = w[1] @ w[0] @ x / temperature - y
    change = (v[1] @ w[0] @ x + w[1] @ v[0] @ x) / temperature
    return [
        (v[1].T @ rest @ x.T + w[1].T @ change @ x.T) / temperature,
        (change @ (w[0] @ x).T + rest @ (v[0] @ x).T) / temperature,
    ]


def flow(w):
    """By enumeration of all paths."""
    through = [np.zeros_like(one) for one in w]
    for i, j, k in itertools.product(*map(range, SIZES)):
        strength = abs(w[0][j, i] * w[1][k, j])
        through[0][j, i] += strength
        through[1][k, j] += strength
    return through


def ranked(scores, masks, n):
    """Masks of the `n` best active entries of all layers; equals in order of position, at least one in each layer."""
    entries = sorted(
        (-s.flat[i], layer, i)
        for layer, (s, mask) in enumerate(zip(scores, masks, strict=True))
        for i in range(s.size)
        if mask.flat[i]
    )
    kept = entries[:n]
    for layer in range(len(scores)):
        if not any(entry[1] == layer for entry in kept):
            saved = next(entry for entry in entries if entry[1] == layer)
            kept = [saved, *[entry for entry in entries if entry[1] != layer][: n - 1]]
    out = [np.zeros(s.shape, bool) for s in scores]
    for _, layer, i in kept:
        out[layer].flat[i] = True
    return out


def naive(score, weights, sparsity, rounds):
    """Prunes along (1 - s) ** (t / T), scoring the masked weights anew in every round."""
    total = sum(w.size for w in weights)
    masks = [np.ones(w.shape, bool) for w in weights]
    for t in range(1, rounds + 1):
        n = math.floor(total * round((1 - sparsity) ** (t / rounds), 12) + 0.5)
        masks = ranked(score([w * m for w, m in zip(weights, masks, strict=True)]), masks, n)
    return masks


def agree(got, expected):
    assert [mask.numpy().tolist() for mask in got.values()] == [mask.tolist() for mask in expected]


ties = pytest.mark.parametrize("ties", [False, True])
seeds = pytest.mark.parametrize("seed", range(8))


@ties
@seeds
@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.9, 1), (0.8, 3), (0.9, 7)])
def test_snip_equals_the_naive_version(sparsity, rounds, seed, ties):
    weights, x, y, layers, probe = case(seed, ties)
    expected = naive(
        lambda w: [abs(g * v) for g, v in zip(gradient(w, x, y), weights, strict=True)], weights, sparsity, rounds
    )
    agree(SNIP(sparsity=sparsity, rounds=rounds).init(layers, None, probe), expected)


@ties
@seeds
@pytest.mark.parametrize("temperature", [1.0, 256.0])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_grasp_equals_the_naive_version(sparsity, temperature, seed, ties):
    weights, x, y, layers, probe = case(seed, ties)

    def score(w):  # the paper removes the largest of -w * Hg
        return [v * hg for v, hg in zip(w, hessian_gradient(w, x, y, temperature), strict=True)]

    agree(
        GraSP(sparsity=sparsity, temperature=temperature).init(layers, None, probe), naive(score, weights, sparsity, 1)
    )


@seeds
def test_grasp_removes_the_weights_whose_removal_raises_the_gradient_flow_most(seed):
    """The flow g . g while a single weight shrinks a little: the kept ones would lower it more than the removed."""
    weights, x, y, layers, probe = case(seed, ties=False)
    masks = GraSP(sparsity=0.5, temperature=1.0).init(layers, None, probe)

    def norm(w):
        return sum((g**2).sum() for g in gradient(w, x, y))

    kept, removed = [], []
    for layer, mask in enumerate(masks.values()):
        for i in range(mask.numel()):
            shrunk, stretched = ([w.copy() for w in weights] for _ in range(2))
            shrunk[layer].flat[i] *= 1 - 1e-6
            stretched[layer].flat[i] *= 1 + 1e-6
            (kept if mask.view(-1)[i] else removed).append((norm(shrunk) - norm(stretched)) / 2e-6)
    assert len(kept) == 27
    assert max(kept) <= min(removed) + 1e-4 * max(map(abs, removed))


@ties
@seeds
@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.9, 5), (0.96, 20)])
def test_synflow_equals_the_naive_version(sparsity, rounds, seed, ties):
    weights, _, _, layers, probe = case(seed, ties)
    probe = Probe(probe.model, example=torch.zeros(1, SIZES[0]).double())
    agree(SynFlow(sparsity=sparsity, rounds=rounds).init(layers, None, probe), naive(flow, weights, sparsity, rounds))


def test_snip_on_a_network_that_a_reader_can_follow():
    """Half of (w2 (w11 + 2 w12) - 1) ** 2 with w1 = (1, -1), w2 = 2: the output is -2, the slope -3."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[1].weight.fill_(2.0)
    probe = Probe(model, [(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]))], half_squares)
    # |g * w|: 3 * 2 * 1 * 1 = 6, 3 * 2 * 2 * 1 = 12, 3 * 1 * 2 = 6
    assert {n: (g * model.get_parameter(n)).abs().tolist() for n, g in probe.gradients().items()} == {
        "0.weight": [[6.0, 12.0]],
        "1.weight": [[6.0]],
    }
    layers = {n: Layer(p.detach()) for n, p in model.named_parameters()}
    masks = SNIP(sparsity=1 / 3).init(layers, None, probe)
    assert {n: m.tolist() for n, m in masks.items()} == {"0.weight": [[False, True]], "1.weight": [[True]]}


def normed(norm):
    """A small convolutional network with `norm(channels)` after each convolution; its weights are always the same."""
    torch.manual_seed(4)
    conv = [part for a in (3, 8) for part in (nn.Conv2d(a, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def test_snip_without_batch_statistics_scores_with_batch_norm_as_the_identity():
    """Inputs far from a normal distribution, so that what the batch norm does to them matters."""
    x = 5 + 3 * torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(16) % 10

    def masks(norm, **options):
        model = normed(norm)
        masks = Sparsifier(model, SNIP(sparsity=0.8, **options), probe=Probe(model, [(x, y)])).masks
        return torch.cat([mask.flatten() for mask in masks.values()])

    plain = masks(lambda n: nn.Identity())
    assert torch.equal(masks(lambda n: nn.BatchNorm2d(n, eps=0), batch_statistics=False), plain)
    assert (masks(nn.BatchNorm2d) & plain).sum() < 0.9 * plain.sum()


def test_snip_prunes_biases_that_are_asked_for():
    """A bias counts as a weight whose input is one: those that start at zero have a score of zero and go."""
    model = normed(nn.BatchNorm2d)
    nn.init.zeros_(model[-1].bias)
    probe = Probe(model, [(torch.rand(16, 3, 6, 6), torch.arange(16) % 10)])
    sparsifier = Sparsifier(model, SNIP(sparsity=0.5), only=["conv", "linear", "8.bias"], probe=probe)
    assert set(sparsifier.masks) == {"0.weight", "3.weight", "8.weight", "8.bias"}
    assert sparsifier.counts["8.bias"] == 1  # every layer keeps one


def bottleneck():
    """Wide layers around a narrow one."""
    torch.manual_seed(0)
    sizes = (64, 200, 6, 200, 200, 200, 10)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b, bias=False), nn.ReLU())][:-1]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


METHODS = {
    "snip": lambda s: SNIP(sparsity=s),
    "iterative snip": lambda s: SNIP(sparsity=s, rounds=10),
    "grasp": lambda s: GraSP(sparsity=s),
    "synflow": lambda s: SynFlow(sparsity=s),
}
every = pytest.mark.parametrize("name", METHODS)


def sparse(name, sparsity, model, digits, **options):
    x, y = digits
    rows = torch.cat([(y == label).nonzero()[:10, 0] for label in range(10)])
    probe = Probe(model, [(x[rows[::2]], y[rows[::2]]), (x[rows[1::2]], y[rows[1::2]])])
    return Sparsifier(model, METHODS[name](sparsity), probe=probe, **options)


@every
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.987, 0.9995])
def test_the_count_is_exact_and_no_layer_is_empty(name, sparsity, digits):
    sparsifier = sparse(name, sparsity, bottleneck(), digits)
    assert sparsifier.active == distribution.budget(sparsifier.total, 1 - sparsity)
    shapes = {key: tuple(mask.shape) for key, mask in sparsifier.masks.items()}
    assert sparsifier.active == sparsifier.method.final_counts(shapes)
    assert min(sparsifier.counts.values()) >= 1


@every
def test_the_masks_depend_on_model_and_batches_alone(name, digits):
    first = sparse(name, 0.9, bottleneck(), digits, seed=0).masks
    torch.manual_seed(99)
    model = bottleneck().eval()
    torch.manual_seed(98)
    second = sparse(name, 0.9, model, digits, seed=1).masks
    assert all(torch.equal(first[key], second[key]) for key in first)


@every
def test_a_network_pruned_before_training_learns_the_digits_and_keeps_its_masks(name, digits):
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    sparsifier = sparse(name, 0.9, model, digits)
    masks = {key: mask.clone() for key, mask in sparsifier.masks.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    for step in range(300):
        rows = torch.arange(step * 64, step * 64 + 64) % 1400
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(masks[key], mask) for key, mask in sparsifier.masks.items())
    assert (model(x[1400:]).argmax(1) == y[1400:]).float().mean() > 0.85


def alive(model, masks):
    """How many active weights lie on a path from the input to the output."""
    for p in model.parameters():
        nn.init.ones_(p)
    through = Probe(model, example=torch.ones(1, 64)).synaptic_flow(masks)
    return sum(count(value > 0) for value in through.values())


@pytest.mark.parametrize("active", [6, 12, 60])
def test_synflow_keeps_paths_open_down_to_one_weight_a_layer(active, digits):
    """The largest compression there is (Tanaka et al., axiom of critical compression): six layers, six weights."""
    model = bottleneck()
    sparsifier = sparse("synflow", 1 - active / 97_200, model, digits)
    assert sparsifier.active == active and alive(model, sparsifier.masks) == active


def test_snip_starves_layers_where_synflow_does_not(digits):
    """A hundred weights for six layers: hardly any that SNIP keeps lie on a path."""
    share = {}
    for name in ("snip", "synflow"):
        model = bottleneck()
        sparsifier = sparse(name, 1 - 100 / 97_200, model, digits)
        share[name] = alive(model, sparsifier.masks) / sparsifier.active
    assert share["snip"] < 0.2 and share["synflow"] == 1.0


def test_a_layer_without_any_score_keeps_one_weight():
    """The gradient of a layer behind dead units is zero: SNIP would empty it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    probe = Probe(model, [(torch.ones(2, 3), torch.tensor([0, 1]))])
    masks = Sparsifier(model, SNIP(sparsity=0.5), probe=probe).masks
    assert count(masks["0.weight"]) == 10 - count(masks["2.weight"]) == 9


def test_fewer_weights_than_layers_are_refused(digits):
    with pytest.raises(ValueError, match="leaves 5 active weights for 6 layers"):
        sparse("snip", 0.99995, bottleneck(), digits)


@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow])
def test_a_probe_is_asked_for(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*granet\.Probe"):
        Sparsifier(nn.Linear(3, 3), kind(sparsity=0.5))
