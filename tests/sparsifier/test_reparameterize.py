import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import granet
from granet import STR, Feather, Fixed, Sparsifier, TopKAST
from granet.sparsifier.reparameterize import is_reparameterized

METHODS = {
    "str": STR(s_init=-3.0, interval=2),
    "top-kast": TopKAST(sparsity=0.7, interval=2, decay=0.01),
    "top-kast global": TopKAST(sparsity=0.8, backward_sparsity=0.4, interval=2, scope="global"),
    "feather": Feather(sparsity=0.7, end=4, theta=0.5),
}
each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def train(model, sparsifier, steps, lr=0.1, **options):
    """Some steps; gives the optimizer back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)
    sparsifier.attach(optimizer)
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        F.cross_entropy(model(torch.randn(9, 12, generator=rng)), torch.arange(9) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@each
def test_names_stay_and_what_is_learned_is_added(method):
    model, plain = mlp(), mlp()
    parameters = dict(model.named_parameters())
    Sparsifier(model, method)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    more = set(after) - set(parameters)
    assert more == ({"0.threshold", "2.threshold"} if isinstance(method, STR) else set())
    assert set(model.state_dict()) == set(plain.state_dict()) | more
    assert isinstance(model[0], nn.Linear) and repr(model) == repr(plain)
    assert is_reparameterized(model) and not is_reparameterized(plain)


def test_gradients_of_the_soft_threshold_are_those_of_its_formula():
    """d/dw is 1 where |w| is above the threshold, d/ds is -sign(w) sigmoid'(s) there, summed; 0 elsewhere."""
    model = mlp()
    Sparsifier(model, STR(s_init=-2.0))
    weight, s = model[0]._parameters["weight"], model[0].threshold
    upstream = torch.randn_like(weight)
    (model[0].weight * upstream).sum().backward()
    above = weight.abs() > torch.sigmoid(torch.tensor(-2.0))
    assert 0 < above.sum() < above.numel()
    assert torch.equal(weight.grad, upstream * above)
    slope = torch.sigmoid(torch.tensor(-2.0)) * (1 - torch.sigmoid(torch.tensor(-2.0)))
    assert s.grad.item() == pytest.approx(-(weight.sign() * upstream * above).sum().item() * slope.item(), rel=1e-5)


def test_top_kast_computes_with_a_and_trains_b():
    model = mlp()
    Sparsifier(model, METHODS["top-kast"])
    weight, layer = model[0]._parameters["weight"], model[0]
    assert torch.equal(layer.weight, weight * layer.active)
    upstream = torch.randn_like(weight)
    (layer.weight * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream * layer.trained)
    assert (layer.trained & ~layer.active).any() and not (layer.active & ~layer.trained).any()


def test_weights_outside_b_rest_and_the_others_decay_by_the_exploration_loss():
    """The update without momentum is exactly -lr (gradient + penalty) on B; outside not a bit changes."""
    model = mlp()
    method = METHODS["top-kast"]
    sparsifier = Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    layer = model[0]
    weight = layer._parameters["weight"]
    before = weight.detach().clone()
    F.cross_entropy(model(torch.randn(9, 12)), torch.arange(9) % 5).backward()
    gradient = weight.grad.clone()
    optimizer.step()
    penalty = 0.01 * before * torch.where(layer.active, 1.0, 1 / 0.3) * layer.trained
    assert torch.allclose(weight, before - 0.1 * (gradient + penalty), atol=1e-7)
    assert torch.equal(weight[~layer.trained], before[~layer.trained])
    assert (weight != before)[layer.trained & ~layer.active].any()


def test_weights_that_leave_b_stop_at_once_momentum_or_not():
    model = mlp()
    sparsifier = Sparsifier(model, METHODS["top-kast"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    sparsifier.attach(optimizer)
    weight, left = model[0]._parameters["weight"], 0
    for step in range(12):
        outside, before, was = ~model[0].trained, weight.detach().clone(), model[0].trained.clone()
        F.cross_entropy(model(torch.randn(9, 12)), torch.arange(9) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(weight[outside], before[outside])
        left += int((was & ~model[0].trained).sum())
        assert sparsifier.version <= step
    assert left


@each
def test_a_network_trains_as_if_its_effective_weights_were_written_out(method):
    """Used twice, by its own module and by another, and tied: gradients are those of the same formula by hand."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight  # tied
            self.third = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            x = self.third(torch.tanh(self.third(x)))
            return F.linear(self.second(torch.tanh(self.first(x))), self.third.weight)

    model = Shared()
    sparsifier = Sparsifier(model, method)
    assert set(sparsifier.masks) == {"first.weight", "third.weight"}
    x = torch.randn(4, 6)
    model(x).square().sum().backward()

    def leaf(module):
        return module._parameters["weight"].detach().clone().requires_grad_()

    def effective(module, w):
        if isinstance(method, STR):
            return w.sign() * F.relu(w.abs() - torch.sigmoid(module.threshold.detach()))
        if isinstance(method, Feather):
            return w  # dense before the first update
        ghost = w * module.trained
        return ghost - (ghost * ~module.active).detach()

    a, b = leaf(model.first), leaf(model.third)
    wa, wb = effective(model.first, a), effective(model.third, b)
    y = F.linear(F.linear(x, wb).tanh(), wb)
    y = F.linear(F.linear(F.linear(y, wa).tanh(), wa), wb)
    y.square().sum().backward()
    assert torch.allclose(model.first._parameters["weight"].grad, a.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(model.third._parameters["weight"].grad, b.grad, rtol=1e-4, atol=1e-6)

    twin = copy.deepcopy(model)
    assert twin.first._parameters["weight"] is twin.second._parameters["weight"]
    expected = model(x)
    assert torch.equal(twin(x), expected)
    sparsifier.fold()
    assert torch.equal(model(x), expected)
    assert model.first.weight is model.second.weight and isinstance(model.first.weight, nn.Parameter)
    assert not is_reparameterized(model) and is_reparameterized(twin)


@each
def test_attention_and_its_fast_path_compute_with_effective_weights(method):
    """Its output projection is read by another module, past any hook; in evaluation torch fuses it all."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(model)
    sparsifier = Sparsifier(model, method)
    assert "self_attn.in_proj_weight" in sparsifier.masks and "self_attn.out_proj.weight" in sparsifier.masks
    plain.load_state_dict(sparsifier.plain_state_dict())
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        assert torch.allclose(model.train(mode)(x), plain.train(mode)(x), atol=1e-6)
        with torch.inference_mode():
            assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_layers_that_read_their_weights_otherwise_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with pytest.raises(ValueError, match=r"LSTM uses '1.weight_ih_l0' .*_flat_weights.*skip='1.weight_ih_l0'"):
        Sparsifier(model, METHODS["top-kast"])
    assert not is_reparameterized(model)
    Sparsifier(model, METHODS["top-kast"], skip="recurrent")
    cell = nn.LSTMCell(4, 4)
    expected = Sparsifier(cell, METHODS["str"]).plain_state_dict()
    plain = nn.LSTMCell(4, 4)
    plain.load_state_dict(expected)
    x = torch.randn(3, 4)
    assert torch.equal(cell(x)[0], plain(x)[0])


@each
def test_embeddings_and_convolutions(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(7, 6, 3), nn.ConvTranspose1d(6, 7, 3))
    sparsifier = Sparsifier(model, method, only=["embedding", "conv"])
    plain = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(7, 6, 3), nn.ConvTranspose1d(6, 7, 3))
    plain.load_state_dict(sparsifier.plain_state_dict())
    x = torch.arange(14).view(2, 7) % 9
    assert torch.equal(model(x), plain(x))
    assert sparsifier.report().layers[0].nonzero == int(plain[0].weight.count_nonzero())


@each
def test_torch_compile_follows_updates_without_a_break(method):
    torch.compiler.reset()
    model = mlp()
    sparsifier = Sparsifier(model, method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
    sparsifier.attach(optimizer)
    for step in range(6):
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(step))
        y = compiled(x)
        assert torch.allclose(y, model(x), atol=1e-6)
        F.cross_entropy(y, torch.arange(9) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.version


@each
def test_averages_follow(method):
    model = mlp()
    early = AveragedModel(model)
    sparsifier = Sparsifier(model, method)
    with pytest.raises(ValueError, match="copy the model after the sparsifier is made"):
        sparsifier.follow(early)
    average = AveragedModel(model)
    sparsifier.follow(average)
    optimizer = train(model, sparsifier, 0)
    for step in range(7):
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(x), torch.arange(9) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert sparsifier.version
    for name, tensor in model.named_buffers():
        assert torch.equal(average.module.get_buffer(name), tensor)
    if not isinstance(method, STR):
        nonzero, mask = average.module[0].weight != 0, sparsifier.masks["0.weight"]
        assert not (nonzero & ~mask).any()
        assert torch.equal(nonzero, mask) or isinstance(
            method, Feather
        )  # averages of a few may lie below the threshold
    expected = average(x)
    sparsifier.fold()
    assert torch.equal(average(x), expected)
    assert set(average.module.state_dict()) == set(mlp().state_dict())


@each
def test_after_fold_the_topology_stays_and_training_goes_on(method):
    model = mlp()
    sparsifier = Sparsifier(model, method)
    optimizer = train(model, sparsifier, 6, weight_decay=0.01)
    sparsifier.fold()
    masks = dict(sparsifier.masks)
    assert not sparsifier.update_due
    for _ in range(6):
        F.cross_entropy(model(torch.randn(9, 12)), torch.arange(9) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, mask in masks.items():
            assert torch.equal(sparsifier.masks[name], mask)
            assert not model.get_parameter(name)[~mask].any()
            assert not optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask].any()
    sparsifier.detach()
    second = Sparsifier(model, Fixed())
    assert all(torch.equal(second.masks[name], mask) for name, mask in masks.items())


def test_states_from_before_and_after_fold_do_not_mix():
    one, two = (Sparsifier(mlp(), METHODS["top-kast"]) for _ in range(2))
    before = one.state_dict()
    one.fold()
    with pytest.raises(ValueError, match="taken before fold"):
        one.load_state_dict(before)
    with pytest.raises(ValueError, match="call fold\\(\\) on this sparsifier too"):
        two.load_state_dict(one.state_dict())
    two.fold()
    two.model.load_state_dict(one.model.state_dict())
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.masks["0.weight"], one.masks["0.weight"])


def test_a_model_has_one_reparameterization_at_a_time():
    model = mlp()
    first = Sparsifier(model, METHODS["str"])
    with pytest.raises(ValueError, match=r"'0.weight' is reparameterized by another sparsifier: call its fold"):
        Sparsifier(model, METHODS["top-kast"])
    first.fold()
    Sparsifier(model, METHODS["top-kast"])


def test_an_optimizer_from_before_the_sparsifier_lacks_the_thresholds():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold '0.threshold' and 1 more"):
        Sparsifier(model, METHODS["str"]).attach(optimizer)


def test_thresholds_take_part_in_weight_decay():
    """With nothing but decay, s goes as s (1 - lr decay) a step, towards zero: the threshold rises."""
    model = mlp()
    sparsifier = Sparsifier(model, STR(s_init=-4.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    sparsifier.attach(optimizer)
    for _ in range(10):
        (0 * model(torch.randn(2, 12)).sum()).backward()
        optimizer.step()
    assert model[0].threshold.item() == pytest.approx(-4 * 0.95**10, rel=1e-5)


@each
def test_flops_and_the_engine_see_the_network_behind(method):
    model, plain = mlp(), mlp()
    sparsifier = Sparsifier(model, method)
    x = torch.randn(4, 12)
    assert granet.flops.count(model, x).per_layer(sparsifier.masks) == granet.flops.count(plain, x).per_layer(
        sparsifier.masks
    )
    accelerated = granet.accelerate(sparsifier, x)
    assert type(method).__name__ in str(accelerated.report()) or "not available" in str(accelerated.report())
    assert "forward" not in vars(model[0])
    compiled = granet.compile(model.eval(), x)
    assert torch.allclose(compiled(x), model(x), atol=1e-4)
    assert is_reparameterized(model)
