"""The probe against derivatives worked out by hand, and the model as it was afterwards."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from granet import Probe

N_IN, HIDDEN, N_OUT = 5, 4, 3


class Linear2(nn.Module):
    """f(x) = W2 W1 x in float64."""

    def __init__(self, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.w1 = nn.Parameter(torch.from_numpy(rng.normal(size=(HIDDEN, N_IN))))
        self.w2 = nn.Parameter(torch.from_numpy(rng.normal(size=(N_OUT, HIDDEN))))

    def forward(self, x):
        return x @ self.w1.T @ self.w2.T


def examples(n, seed=1):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, N_IN))), torch.from_numpy(rng.normal(size=(n, N_OUT)))


def by_hand(w1, w2, x, y, temperature=1.0):
    """The gradient of the mean of (W2 W1 x / T - y) ** 2, by matrix calculus."""
    slope = 2 * (x @ w1.T @ w2.T / temperature - y) / y.size / temperature
    return {"w1": (slope @ w2).T @ x, "w2": slope.T @ (x @ w1.T)}


def arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def close(got, expected, **tolerance):
    assert list(got) == list(expected)
    for name in expected:
        np.testing.assert_allclose(got[name].numpy(), expected[name], **({"rtol": 1e-10} | tolerance))


@pytest.fixture
def masks():
    rng = torch.Generator().manual_seed(2)
    return {name: torch.rand(shape, generator=rng) < 0.6 for name, shape in (("w1", (4, 5)), ("w2", (3, 4)))}


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (7, 1, 4)])
def test_gradients_are_the_mean_over_all_examples_whatever_the_batches(sizes):
    model, (x, y) = Linear2(), examples(12)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    close(Probe(model, batches, F.mse_loss).gradients(), by_hand(**arrays(model), x=x.numpy(), y=y.numpy()))


def test_gradients_of_the_masked_network_are_dense(masks):
    model, (x, y) = Linear2(), examples(6)
    weights = {name: w * masks[name].numpy() for name, w in arrays(model).items()}
    got = Probe(model, [(x, y)], F.mse_loss).gradients(masks)
    close(got, by_hand(**weights, x=x.numpy(), y=y.numpy()))
    assert all(got[name][~mask].abs().min() > 0 for name, mask in masks.items())


def test_only_the_parameters_of_the_masks_are_answered_for():
    model = Linear2()
    only = {"w2": torch.ones(3, 4, dtype=torch.bool)}
    probe = Probe(model, [examples(6)], F.mse_loss)
    for ask in (probe.gradients, probe.hessian_gradient, probe.synaptic_flow):
        assert list(ask(only)) == ["w2"]
    torch.testing.assert_close(probe.gradients(only)["w2"], probe.gradients()["w2"])
    # a gradient flow of fewer parameters is another one
    assert not torch.allclose(probe.hessian_gradient(only)["w2"], probe.hessian_gradient()["w2"])


def numeric_hessian_gradient(weights, masks, x, y, temperature, step=1e-6):
    """H g by central differences of the gradient along g, g zero at inactive weights."""
    g = by_hand(**weights, x=x, y=y, temperature=temperature)
    g = {name: g[name] * masks[name] for name in g}
    ahead, behind = (
        by_hand(**{n: weights[n] + sign * step * g[n] for n in g}, x=x, y=y, temperature=temperature)
        for sign in (1, -1)
    )
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in g}


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_hessian_times_the_gradient_is_that_of_finite_differences(sizes, masked, temperature, masks):
    model, (x, y) = Linear2(), examples(12)
    dense = {name: np.ones(mask.shape, bool) for name, mask in masks.items()}
    active = {name: mask.numpy() for name, mask in masks.items()} if masked else dense
    weights = {name: w * active[name] for name, w in arrays(model).items()}
    step = 1e-4 if temperature == 1 else 1.0
    expected = numeric_hessian_gradient(weights, active, x.numpy(), y.numpy(), temperature, step)
    probe = Probe(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), F.mse_loss)
    got = probe.hessian_gradient(masks if masked else None, temperature)
    size = max(np.abs(value).max() for value in expected.values())
    close(got, expected, rtol=1e-5, atol=1e-7 * size)


def test_a_linear_loss_has_no_hessian():
    model = nn.Linear(3, 2)
    got = Probe(model, [(torch.ones(1, 3), torch.ones(1))], lambda output, _: output.sum()).hessian_gradient()
    assert all(not value.any() for value in got.values())


def test_attention_has_a_hessian():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    hg = Probe(model, [(torch.randn(4, 3, 8), torch.tensor([0, 1, 2, 0]))]).hessian_gradient(temperature=1.0)
    assert all(value.any() for name, value in hg.items() if "weight" in name)


def test_the_synaptic_flow_is_the_sum_over_paths():
    """Every path of a network with three layers, one by one."""
    rng = np.random.default_rng(4)
    sizes = (3, 4, 5, 2)
    weights = [rng.normal(size=(b, a)) for a, b in itertools.pairwise(sizes)]
    active = [rng.random(w.shape) < 0.7 for w in weights]
    expected = [np.zeros_like(w) for w in weights]
    for nodes in itertools.product(*map(range, sizes)):
        edges = [(layer, nodes[layer + 1], nodes[layer]) for layer in range(3)]
        strength = np.prod([abs(weights[n][i, j]) * active[n][i, j] for n, i, j in edges])
        for n, i, j in edges:
            expected[n][i, j] += strength
    model = nn.Sequential(nn.Linear(3, 4, False), nn.ReLU(), nn.Linear(4, 5, False), nn.ReLU(), nn.Linear(5, 2, False))
    names = ["0.weight", "2.weight", "4.weight"]
    with torch.no_grad():
        for name, w in zip(names, weights, strict=True):
            model.get_parameter(name).copy_(torch.from_numpy(w))
    weights[:] = [model.get_parameter(name).detach().double().numpy() for name in names]
    masks = {name: torch.from_numpy(mask) for name, mask in zip(names, active, strict=True)}
    got = Probe(model, example=torch.zeros(7, 3)).synaptic_flow(masks)
    assert all(value.dtype == torch.float64 for value in got.values())
    close(got, dict(zip(names, expected, strict=True)), rtol=1e-6)
    # what flows into the network flows through each of its layers
    sums = [value.sum().item() for value in got.values()]
    assert sums == pytest.approx([sums[0]] * 3)


def test_the_synaptic_flow_through_convolutions_is_what_is_lost_without_the_weight():
    """R is linear in every single weight, so its flow is the difference that setting it to zero makes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2, False)
    )
    flow = Probe(model, example=torch.zeros(1, 2, 4, 4)).synaptic_flow()
    positive = copy.deepcopy(model).double()
    ones = torch.ones(1, 2, 4, 4).double()
    with torch.no_grad():
        for p in positive.parameters():
            p.abs_()
        whole = positive(ones).sum()
        for name, p in positive.named_parameters():
            for i in range(0, p.numel(), 5):
                value = p.view(-1)[i].clone()
                p.view(-1)[i] = 0
                lost = whole - positive(ones).sum()
                # a pooling may then let another input through, which only adds to what is left
                assert lost <= flow[name].view(-1)[i] * (1 + 1e-9)
                if name == "4.weight":
                    torch.testing.assert_close(lost, flow[name].view(-1)[i])
                p.view(-1)[i] = value


def test_the_synaptic_flow_uses_the_statistics_of_batch_norm_and_no_signs():
    """In evaluation mode, absolute values of scale, shift, mean and variance alike."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)).double()
    norm = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2.0, 0.5]))
        norm.bias.copy_(torch.tensor([-1.0, 3.0]))
        norm.running_mean.copy_(torch.tensor([-0.25, 0.5]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    scale = torch.tensor([2.0, 0.5]).double() / torch.sqrt(torch.tensor([4.0, 0.25]).double() + norm.eps)
    first, last = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    hidden = (first.sum(1) - torch.tensor([0.25, 0.5])) * scale + torch.tensor([1.0, 3.0])
    flow = Probe(model, example=torch.zeros(1, 3)).synaptic_flow()
    torch.testing.assert_close(flow["0.weight"], first * (scale * last.sum(0))[:, None])
    torch.testing.assert_close(flow["2.weight"], last * hidden)


def test_the_flow_of_a_deep_network_neither_overflows_nor_vanishes():
    """Sixty wide layers: 10 ** 60 and more, beyond float32."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(60)))
    flow = Probe(model, example=torch.zeros(1, 200)).synaptic_flow()
    sums = torch.stack([value.sum() for value in flow.values()])
    assert sums.min() > 1e40
    torch.testing.assert_close(sums / sums[0], torch.ones_like(sums))


class Digits(nn.Module):
    """A network with all that could be disturbed: statistics, dropout, a buffer that is replaced, a frozen weight."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(144, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.head(self.body(x))


@pytest.fixture
def digits():
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    model = Digits()
    model(x[:50])  # statistics that are not those of a new network
    model.body[1].eval()
    model.head.weight.requires_grad_(False)
    F.cross_entropy(model(x[:10]), y[:10]).backward()
    return model, torch.utils.data.TensorDataset(x[:200], y[:200])


def everything(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return state, grads, modes, flags, [id(t) for t in (*model.parameters(), *model.buffers())]


QUESTIONS = {
    "gradients": lambda probe: probe.gradients(),
    "hessian_gradient": lambda probe: probe.hessian_gradient(),
    "synaptic_flow": lambda probe: probe.synaptic_flow(),
}
every = pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)


@every
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(question, fails, digits):
    model, dataset = digits
    before = everything(model)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batches = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    probe = Probe(model, batches)
    with torch.no_grad():  # as the sparsifier might call it
        question(probe)
        if fails:
            handle = model.head.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                question(probe)
            handle.remove()
        assert not torch.is_grad_enabled()
    after = everything(model)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert before[2:] == after[2:]
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(generators[0], now[0]) and generators[1:] == now[1:]


@every
def test_the_answer_depends_on_model_and_batches_alone(question, digits):
    """Not on the global generator, though there are dropout and a shuffling loader; not on the model's mode."""
    model, dataset = digits
    probe = Probe(model, torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True))
    torch.manual_seed(1)
    first = question(probe)
    torch.manual_seed(2)
    model.eval()
    second = question(probe)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_weights_have_a_gradient_too(digits):
    model, dataset = digits
    assert Probe(model, [dataset[:20]]).gradients()["head.weight"].any()


def test_half_precision_is_answered_in_float32():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).bfloat16()
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([0, 1, 0, 1, 1, 0])
    probe = Probe(model, [(x, y)] * 2)
    assert all(
        value.dtype == torch.float32 for ask in (probe.gradients, probe.hessian_gradient) for value in ask().values()
    )


def test_inputs_may_be_several_and_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = self.a

        def forward(self, x, z):
            return self.b(self.a(x)) + z

    model = Tied()
    x, z = torch.ones(2, 3), torch.zeros(2, 3)
    got = Probe(model, [((x, z), torch.zeros(2, 3))], F.mse_loss).gradients()
    assert list(got) == ["a.weight"]
    F.mse_loss(model(x, z), torch.zeros(2, 3)).backward()
    torch.testing.assert_close(got["a.weight"], model.a.weight.grad)


@pytest.mark.parametrize("question", [QUESTIONS["gradients"], QUESTIONS["hessian_gradient"]])
def test_no_batches_is_an_error(question):
    with pytest.raises(ValueError, match="no batches"):
        question(Probe(nn.Linear(2, 2), []))


def test_a_generator_is_refused_before_it_is_used_up():
    pairs = ((torch.ones(1, 2), torch.zeros(1).long()) for _ in range(3))
    with pytest.raises(ValueError, match=r"generator.*list\(batches\)"):
        Probe(nn.Linear(2, 2), pairs)
    assert len(list(pairs)) == 3


def test_the_synaptic_flow_needs_a_shape():
    with pytest.raises(ValueError, match="example="):
        Probe(nn.Linear(2, 2)).synaptic_flow()
    with pytest.raises(ValueError, match="int64"):
        Probe(nn.Linear(2, 2), [(torch.ones(1, 2).long(), torch.ones(1))]).synaptic_flow()
    from_batch = Probe(nn.Linear(2, 2), [(torch.ones(1, 2), torch.ones(1))]).synaptic_flow()
    assert from_batch["weight"].shape == (2, 2)


def test_a_loss_that_is_not_finite_names_its_batch():
    good, bad = torch.ones(1, 2), torch.full((1, 2), float("inf"))
    probe = Probe(nn.Linear(2, 2), [(good, torch.tensor([0])), (bad, torch.tensor([0]))])
    with pytest.raises(ValueError, match=r"loss of batch 1 is (nan|inf)"):
        probe.gradients()


def test_a_score_that_is_not_finite_names_its_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    probe = Probe(model, [(torch.ones(1, 2), torch.ones(1, 2))], lambda y, _: (y - y.detach()).abs().sqrt().sum())
    with pytest.raises(ValueError, match=r"0\.weight"):  # the slope of a root at zero
        probe.gradients()
    with torch.no_grad():
        model[1].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"[01]\.weight"):
        Probe(model, example=torch.ones(1, 2)).synaptic_flow()


@every
def test_an_output_that_is_no_tensor_is_named(question):
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"output of Pair is a tuple"):
        question(Probe(Pair(2, 2), [(torch.ones(1, 2), torch.tensor([0]))]))


def test_what_is_no_pair_is_named():
    with pytest.raises(ValueError, match=r"batch 0 must be a pair"):
        Probe(nn.Linear(2, 2), [(torch.ones(1, 2),)]).gradients()


def test_masks_of_another_model_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'wieght'.*did you mean 'weight'"):
        Probe(nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([0]))]).gradients({"wieght": torch.ones(2, 2).bool()})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Probe(nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([0]))]).hessian_gradient(temperature=temperature)
