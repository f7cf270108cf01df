"""The sparsifier in the realities of training: optimizers, clipping, scalers, closures, averages, compilation."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import granet
from granet import GraNet, RigL, Sparsifier, Static
from granet.sparsifier.masking import leaks
from granet.topology import count

ELEMENTWISE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
MIXING = {  # these move inactive weights, or fill their buffers, even when the gradient there is zero
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}
MATRIX = [p for p in ("Muon",) if hasattr(torch.optim, p)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))


def granet_method(**more):
    return GraNet(**{"sparsity": 0.9, "initial_sparsity": 0.5, "end": 12, "total": 30, "interval": 3, **more})


def train(model, optimizer, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, 12, generator=rng)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def dirt(sparsifier, *optimizers):
    """How many inactive weights or buffer entries are not zero."""
    total = 0
    for name, p in sparsifier._parameters.items():
        states = [optimizer.state[p] for optimizer in optimizers if p in optimizer.state]
        buffers = [v for s in states for v in s.values() if torch.is_tensor(v) and v.shape == p.shape]
        total += sum(int((tensor.detach()[~sparsifier.masks[name]] != 0).sum()) for tensor in [p, *buffers])
    return total


@pytest.mark.parametrize("name", [*ELEMENTWISE, *MIXING])
def test_the_state_is_clean_after_every_step_of_any_optimizer(name):
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = {**ELEMENTWISE, **MIXING}[name](model.parameters())
    sparsifier.attach(optimizer)
    for step in range(30):
        train(model, optimizer, 1, seed=step)
        assert dirt(sparsifier, optimizer) == 0
    assert sparsifier.step == 30
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sparsifier._attached.kept is (name in ELEMENTWISE)


def test_every_optimizer_of_torch_is_among_those_tested():
    """The list grows with torch: an optimizer that torch adds has to be tried."""
    ours = {type(make([nn.Parameter(torch.ones(2, 2))])).__name__ for make in {**ELEMENTWISE, **MIXING}.values()}
    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert classes - ours - {"Optimizer", "SparseAdam", "LBFGS", "Muon"} == set()


@pytest.mark.parametrize("name", MATRIX)
def test_an_optimizer_that_mixes_coordinates_beside_another(name):
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    matrices = [p for p in model.parameters() if p.ndim == 2]
    pair = (
        getattr(torch.optim, name)(matrices, lr=0.02),
        torch.optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.1),
    )
    sparsifier.attach(*pair)
    for step in range(30):
        rng = torch.Generator().manual_seed(step)
        model(torch.randn(16, 12, generator=rng)).square().mean().backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        assert dirt(sparsifier, *pair) == 0
    assert sparsifier.step == 30
    assert sparsifier._attached.kept is False


def test_lbfgs_with_its_closure():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method(total=12, end=9))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5, line_search_fn="strong_wolfe")
    sparsifier.attach(optimizer)
    x = torch.randn(64, 12)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(12):
        seen.append(optimizer.step(closure).item())
        assert dirt(sparsifier, optimizer) == 0
    assert sparsifier.step == 12
    assert seen[-1] < seen[0]


def test_a_closure_gives_what_the_plain_loop_gives():
    def run(closure):
        model = mlp()
        sparsifier = Sparsifier(model, granet_method())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier.attach(optimizer)
        for step in range(30):
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))

            def loss(x=x):
                optimizer.zero_grad()
                value = model(x).square().mean()
                value.backward()
                return value

            if closure == "keyword":
                optimizer.step(closure=loss)
            elif closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
        return model, sparsifier

    plain = run(False)
    for other in (run(True), run("keyword")):
        assert all(torch.equal(a, b) for a, b in zip(plain[0].parameters(), other[0].parameters(), strict=True))
        assert all(torch.equal(plain[1].masks[n], other[1].masks[n]) for n in plain[1].masks)


def test_the_explicit_verbs_give_what_the_hooks_give():
    models = []
    for hooks in (True, False):
        model = mlp()
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


def test_a_learning_rate_scheduler_may_be_built_before_or_after():
    for before in (True, False):
        model = mlp()
        sparsifier = Sparsifier(model, granet_method())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if before:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        sparsifier.attach(optimizer)
        if not before:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        for _ in range(10):
            train(model, optimizer, 1)
            scheduler.step()
        assert sparsifier.step == 10
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_regrown_weight_starts_from_zero_with_moments_of_its_layers_size():
    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.7, end=100, interval=5))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    sparsifier.attach(optimizer)
    train(model, optimizer, 4)
    before = dict(sparsifier.masks)
    train(model, optimizer, 1)
    grown = {name: sparsifier.masks[name] & ~before[name] for name in before}
    assert sum(map(count, grown.values())) > 10
    for name, new in grown.items():
        p = sparsifier._parameters[name]
        assert not p.detach()[new].any()
        assert not optimizer.state[p]["exp_avg"][new].any()
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            held = optimizer.state[p][key]
            usual = held[sparsifier.masks[name] & before[name]].mean() * 0.01  # (1 - beta1) ** 2
            assert (held[new] > usual / 2).all() and (held[new] < usual * 1000).all()


@pytest.mark.parametrize("method", ["rigl", "granet", "set", "mest", "snfs", "dsr"])
def test_a_weight_dropped_and_grown_in_one_update_keeps_its_value_and_state(method):
    """At 20 % sparsity nine of ten weights that go come back at once: to the optimizer they were never inactive."""
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    share = "regeneration" if method == "granet" else "drop_fraction"
    more = {
        "rigl": {"end": 100},
        "granet": {"initial_sparsity": 0.2, "end": 5, "total": 100},
        "mest": {"halve": 50, "end": 100},
        "dsr": {"total": 100, "threshold": 0.1},
    }.get(method, {"total": 100})
    sparsifier = Sparsifier(model, granet.METHODS[method](sparsity=0.2, interval=5, **{share: 0.9}, **more))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    sparsifier.attach(optimizer, hooks=False)
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        model(torch.randn(8, 40, generator=rng)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        before, mask = model.weight.detach().clone(), sparsifier.masks["weight"]
        moments = {key: optimizer.state[model.weight][key].clone() for key in ("exp_avg", "exp_avg_sq")}
        sparsifier.after_step()
        optimizer.zero_grad()
    assert sparsifier.version == 1
    both = mask & sparsifier.masks["weight"]
    active = count(mask)
    assert count(both) > 0.5 * active  # only a tenth was never dropped (DSR: what is above its threshold)
    assert torch.equal(model.weight.detach()[both], before[both])
    for key, moment in moments.items():
        assert torch.equal(optimizer.state[model.weight][key][both], moment[both])


def test_masks_take_one_byte_a_weight_and_the_model_gains_nothing():
    model = mlp()
    keys, hooks = (
        list(model.state_dict()),
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )
    sparsifier = Sparsifier(model, granet_method())
    assert all(mask.element_size() == 1 and mask.dtype == torch.bool for mask in sparsifier.masks.values())
    assert list(model.state_dict()) == keys
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_clipping_counts_live_gradients_only():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.95))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(16, 12)).square().mean().backward()
    live = [p.grad[sparsifier.masks[n]] if n in sparsifier.masks else p.grad for n, p in model.named_parameters()]
    expected = torch.cat([g.reshape(-1) for g in live]).norm()
    dense = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = sparsifier.clip_grad_norm_(float(expected) / 2)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    assert dense > 1.05 * expected
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, kept[name] / 2, rtol=1e-3)


def test_a_scaler_that_skips_a_step_skips_it_here_too():
    """Unfused optimizers are not called on overflow at all."""
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(12):
        masks = dict(sparsifier.masks)
        scaler.scale(model(torch.randn(16, 12)).square().mean()).backward()
        if step == 5:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert sparsifier.step == (step + 1 if step < 5 else step)
        if step == 5:  # the sixth step would have been an update
            assert all(masks[n] is sparsifier.masks[n] for n in masks)
    assert dirt(sparsifier, optimizer) == 0


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_under_a_scaler_that_overflows(make):
    """A fused optimizer is called with gradients still scaled, and with `found_inf` set where it is to do nothing."""
    models, sparsifiers = [], []
    for scaled in (True, False):
        model = mlp()
        sparsifier = Sparsifier(model, granet_method())
        optimizer = make(model.parameters(), lr=0.01, fused=True)
        sparsifier.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, backoff_factor=0.5, enabled=scaled)
        for step in range(13):
            spoilt = step == 5
            if spoilt and not scaled:
                continue
            x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            scaler.scale(model(x).square().mean()).backward()
            if spoilt:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert sparsifier.step == 12
        models.append(model)
        sparsifiers.append(sparsifier)
    assert all(torch.equal(sparsifiers[0].masks[n], sparsifiers[1].masks[n]) for n in sparsifiers[0].masks)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_an_update_on_nan_is_put_off_and_made_up_for():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method(end=6, total=30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train(model, optimizer, 5)
    before = dict(sparsifier.masks)
    model(torch.randn(16, 12)).square().mean().backward()
    model[2].weight.grad.view(-1)[(~sparsifier.masks["2.weight"]).view(-1).nonzero()[0]] = float("nan")
    with pytest.warns(RuntimeWarning, match="topology update at step 6 skipped.*NaN or infinite"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(before[n], sparsifier.masks[n]) for n in before)
    assert sparsifier.step == 6 and sparsifier.update_due
    state = copy.deepcopy(sparsifier.state_dict())
    train(model, optimizer, 1)
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)
    assert not sparsifier.update_due
    sparsifier.load_state_dict(state)
    assert sparsifier.update_due  # a resumed run makes up for it as well


def test_bf16_autocast_scores_in_float32():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(16, 12)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)
    assert dirt(sparsifier, optimizer) == 0


def test_pure_bf16_parameters():
    model = mlp().bfloat16()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    for _ in range(12):
        model(torch.randn(16, 12).bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert dirt(sparsifier, optimizer) == 0
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)


def test_torch_compile_does_not_recompile_as_the_topology_changes():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    train(torch.compile(model, backend=backend), optimizer, 30)
    assert sparsifier.version > 3
    assert len(compiled) == 1


def test_channels_last_gives_the_same_run():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 3)
        )
        model = model.double().to(memory_format=layout)
        sparsifier = Sparsifier(model, granet_method())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier.attach(optimizer)
        for step in range(30):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).double().to(memory_format=layout)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert dirt(sparsifier, optimizer) == 0
        results.append(sparsifier.masks)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_average_of_the_weights_stays_sparse():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)), copy.deepcopy(model)]
    for average in averages:
        sparsifier.follow(average)
    for step in range(30):
        train(model, optimizer, 1, seed=step)
        averages[0].update_parameters(model)
        for mine, theirs in zip(averages[1].parameters(), model.parameters(), strict=True):
            mine.detach().lerp_(theirs.detach(), 0.01)
        for average in averages:
            named = {name.removeprefix("module."): p for name, p in average.named_parameters()}
            assert not leaks((mask, [named[name]]) for name, mask in sparsifier.masks.items())
    assert sparsifier.version > 3
    with pytest.raises(ValueError, match="no copy of the model"):
        sparsifier.follow(nn.Linear(2, 2))


def test_tied_and_shared_weights_are_counted_and_masked_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(10, 10)
            self.b = self.a
            self.c = nn.Linear(10, 10)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model = Tied()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    assert list(sparsifier.masks) == ["a.weight"]
    assert sparsifier.total == 100 and sparsifier.active == 20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    assert model.c.weight is model.a.weight
    assert int((model.c.weight != 0).sum()) == 20


def test_every_kind_of_layer_trains_sparse():
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(4, 8, 3, padding=1)
            self.b = nn.Conv2d(1, 4, 3, groups=1)
            self.c = nn.Conv3d(1, 3, 2)
            self.d = nn.ConvTranspose1d(8, 4, 2)
            self.e = nn.MultiheadAttention(8, 2, batch_first=True)
            self.f = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            y = self.d(self.a(x))
            z = self.b(x[:, None]).sum() + self.c(x[:, None, None].expand(-1, -1, 2, -1, -1)).sum()
            h = self.a(x).transpose(1, 2)
            return y.sum() + z + self.e(h, h, h)[0].sum() + self.f(h)[0].sum()

    model = Zoo()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    assert "e.in_proj_weight" in sparsifier.masks and "f.weight_hh_l0" in sparsifier.masks
    for _ in range(12):
        model(torch.randn(2, 4, 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert dirt(sparsifier, optimizer) == 0
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.1)


def test_the_seed_decides_the_topology_and_the_global_generator_does_not():
    def masks(seed, noise):
        torch.manual_seed(noise)
        return Sparsifier(mlp(), Static(sparsity=0.8), seed=seed).masks

    first, again, other = masks(1, 10), masks(1, 20), masks(2, 10)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    state = torch.get_rng_state()
    Sparsifier(mlp_without_seeding(), Static(sparsity=0.8))
    assert torch.equal(state, torch.get_rng_state())


def mlp_without_seeding():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 4))
    return model.to_empty(device="cpu")


def test_the_report_tells_masks_from_values():
    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.8, end=100, interval=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train(model, optimizer, 5)
    report = sparsifier.report()
    assert sum(layer.active for layer in report.layers) == sparsifier.active
    assert sum(layer.nonzero for layer in report.layers) < sparsifier.active  # what was just grown is still zero
    text = str(report)
    assert "RigL(sparsity=0.8" in text and "total" in text and f"{sparsifier.active:,}" in text
    assert sparsifier.last_update.step == 5
    assert sparsifier.last_update.grown == sparsifier.last_update.dropped
    assert 0.2 < sparsifier.exploration <= 1


def test_mistakes_are_explained():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    with pytest.raises(RuntimeError, match="attach"):
        sparsifier.before_step()
    with pytest.raises(RuntimeError, match="attach"):
        sparsifier.clip_grad_norm_(1.0)
    with pytest.raises(ValueError, match=r"does not hold '0.weight' and 2 more"):
        sparsifier.attach(torch.optim.SGD(mlp().parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        sparsifier.attach(optimizer)
    state = sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"the state is of GraNet\(.*this sparsifier runs Static"):
        Sparsifier(mlp(), Static(sparsity=0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        Sparsifier(nn.Sequential(nn.Linear(12, 40)), granet_method()).load_state_dict(state)
    with pytest.raises(ValueError, match="has no masks"):
        sparsifier.load_state_dict({k: v for k, v in state.items() if k != "masks"})


def test_no_gradient_at_an_update_changes_nothing():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    model(torch.randn(4, 12)).sum().backward()
    for p in model.parameters():
        p.grad = None
    with pytest.warns(RuntimeWarning, match="no sparse parameter has a gradient"):
        optimizer.step()
    assert sparsifier.version == 0


@pytest.mark.parametrize(
    "method",
    [
        granet_method(),
        granet.RigL(sparsity=0.8, end=30, interval=3),
        granet.SNFS(sparsity=0.8, total=40, interval=3),
        granet.MEST(sparsity=0.8, halve=10, end=30, interval=3, soft_bound=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_layer_without_gradient_is_trained_round(method):
    """A frozen layer, or one in no path from the loss, does not hold up the others."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, method, only="linear")  # else what is frozen would stay dense
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    mask, other = sparsifier.masks["0.weight"].clone(), sparsifier.masks["2.weight"].clone()
    for step in range(30):
        weight = model[2].weight.detach().clone()
        train(model, optimizer, 1, seed=step)
        moved = not torch.equal(weight, model[2].weight)
        assert moved or (method.replaces_step and method.is_update(sparsifier.step))
    assert sparsifier.version >= 5 and not torch.equal(other, sparsifier.masks["2.weight"])
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 1 - method.sparsity)
    if isinstance(method, granet.RigL | granet.SNFS):
        assert torch.equal(mask, sparsifier.masks["0.weight"])


def test_a_warm_up_from_zero_does_not_hide_that_an_optimizer_mixes():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    sparsifier.attach(optimizer)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 5))  # zero at first
    for step in range(10):
        train(model, optimizer, 1, seed=step)
        warm_up.step()
        assert dirt(sparsifier, optimizer) == 0


def test_dense_weights_that_are_loaded_are_cleared_at_the_next_step():
    model = mlp()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    train(model, optimizer, 10)
    model.load_state_dict(dense)
    with pytest.warns(RuntimeWarning, match="at step 11 inactive weights.*If dense weights were loaded"):
        train(model, optimizer, 1)
    assert dirt(sparsifier, optimizer) == 0
    train(model, optimizer, 100)
    assert sparsifier._attached.kept is True  # the optimizer was not to blame


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_scaler_that_skips_one_of_two_optimizers(fused, spoilt):
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    pair = [torch.optim.Adam(list(model.parameters())[part], lr=0.01, fused=fused) for part in (slice(2), slice(2, 9))]
    sparsifier.attach(*pair)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        scaler.scale(model(torch.randn(8, 12)).square().mean()).backward()
        if step == 4:
            pair[spoilt].param_groups[0]["params"][0].grad[0] = float("inf")
        for optimizer in pair:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in pair:
            optimizer.zero_grad()
        assert dirt(sparsifier, *pair) == 0


def test_a_copy_of_all_three_trains_as_the_original_does():
    model = mlp()
    sparsifier = Sparsifier(model, granet_method())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    train(model, optimizer, 2)
    other_model, other_optimizer, other = copy.deepcopy((model, optimizer, sparsifier))
    for step in range(10):
        train(model, optimizer, 1, seed=step)
    assert other.step == 2
    for step in range(10):
        train(other_model, other_optimizer, 1, seed=step)
    assert other.step == sparsifier.step == 12
    assert all(torch.equal(other.masks[name], mask) for name, mask in sparsifier.masks.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        pickle.dumps(sparsifier)


def test_a_closure_called_several_times_counts_once():
    class Thrice(torch.optim.SGD):
        def step(self, closure):
            for _ in range(3):
                loss = closure()
            super().step()
            return loss

    kept = []
    for kind in (torch.optim.SGD, Thrice):
        model = mlp()
        sparsifier = Sparsifier(model, granet_method(growth="momentum"))
        optimizer = kind(model.parameters(), lr=0.0)
        sparsifier.attach(optimizer)
        x = torch.ones(4, 12)

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        kept.append(sparsifier.state_dict()["gradients"])
    assert kept[0].keys() == kept[1].keys() and kept[0]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_clipping_survives_an_infinite_gradient_of_an_inactive_weight():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(8, 12)).square().mean().backward()
    place = (~sparsifier.masks["0.weight"]).nonzero()[0]
    model[0].weight.grad[tuple(place)] = float("inf")
    assert torch.isfinite(sparsifier.clip_grad_norm_(0.01))
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_masks_that_a_method_cannot_start_from():
    masks = Sparsifier(mlp(), Static(sparsity=0.8)).masks
    with pytest.raises(ValueError, match="STR finds its masks by training: it cannot start from masks="):
        Sparsifier(mlp(), granet.STR(), masks=masks)
    full = {name: torch.ones_like(mask) if name == "2.weight" else mask for name, mask in masks.items()}
    method = granet.MEST(sparsity=0.8, halve=5, end=10, interval=3, soft_bound=True)
    model = mlp()
    sparsifier = Sparsifier(model, method, masks=full)  # more in one layer than its budget
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    train(model, optimizer, 12)
    assert sparsifier.active == granet.distribution.budget(sparsifier.total, 0.2)


def test_detached_it_lets_go():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    sparsifier.detach()
    train(model, optimizer, 1)
    assert sparsifier.step == 0
    assert dirt(sparsifier, optimizer) > 0
    sparsifier.attach(optimizer)  # and takes hold again
    with pytest.warns(RuntimeWarning, match="weights that the masks call inactive were not zero before the first step"):
        train(model, optimizer, 1)
    assert dirt(sparsifier, optimizer) == 0


def test_weight_norm_is_left_dense():
    """The weight is computed from its parameters: pruning them would divide zero by zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has a newer one, which was left dense already
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(12, 40)), nn.ReLU(), nn.Linear(40, 4))
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    assert set(sparsifier.counts) == {"2.weight"}
    assert torch.isfinite(model(torch.randn(2, 12))).all()
    assert "weight_norm computes the weight from it" in str(granet.plan(model, Static(sparsity=0.9)))


def test_deep_r_leaves_what_is_frozen_where_it_is():
    model = mlp()
    sparsifier = Sparsifier(model, granet.DeepR(sparsity=0.8, l1=0.01, temperature=1e-3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train(model, optimizer, 2)
    model[2].weight.requires_grad_(False)
    mask, weight = sparsifier.masks["2.weight"].clone(), model[2].weight.clone()
    train(model, optimizer, 1)
    both = mask & sparsifier.masks["2.weight"]
    assert torch.equal(model[2].weight[both], weight[both])
