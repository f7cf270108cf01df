"""Around the optimizer's step: closures, gradient scalers, clipping, buffers and learning rates."""

import pytest
import torch
from small_training import granet_method, nonzero_inactive, three_layers

from granet import Sparsifier, Static
from granet.sparsifier import stepping


def test_mixing_is_exact_and_in_float32():
    first, second = torch.tensor([1.0, -2.0]).bfloat16(), torch.tensor([3.0, 5.0]).bfloat16()
    copy = stepping.mixed(None, first, 0.0, 1.0)
    assert copy.dtype == torch.bfloat16 and copy is not first and torch.equal(copy, first)
    kept = stepping.mixed(None, first, 1.0, 0.1)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, first.float() * 0.1)
    again = stepping.mixed(kept, second, 0.5, 2.0)
    assert again is kept
    torch.testing.assert_close(again, first.float() * 0.05 + second.float() * 2)
    assert torch.equal(stepping.mixed(kept, first, 0.0, 0.25), first.float() * 0.25)


def test_buffers_are_found_by_shape():
    p, q = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizers = [torch.optim.AdamW([p], amsgrad=True), torch.optim.SGD([q], lr=0.1, momentum=0.9)]
    assert stepping.buffers(optimizers, p) == []
    for parameter, optimizer in zip((p, q), optimizers, strict=True):
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
    assert len(stepping.buffers(optimizers, p)) == 3  # two moments and the largest of the second
    assert len(stepping.buffers(optimizers, q)) == 1


def test_learning_rates_are_those_of_each_group():
    p, q, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.5}, {"params": [q]}], lr=0.1)
    rates = stepping.learning_rates([optimizer], {"p": p, "q": q, "other": other})
    assert rates == {"p": 0.5, "q": 0.1, "other": 0.0}


def test_a_closure_gives_what_the_plain_loop_gives():
    def run(closure):
        model = three_layers()
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


def test_clipping_counts_live_gradients_only():
    model = three_layers()
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
    model = three_layers()
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
    assert nonzero_inactive(sparsifier, optimizer) == 0


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_under_a_scaler_that_overflows(make):
    """A fused optimizer is called with gradients still scaled, and with `found_inf` set where it is to do nothing."""
    models, sparsifiers = [], []
    for scaled in (True, False):
        model = three_layers()
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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_scaler_that_skips_one_of_two_optimizers(fused, spoilt):
    model = three_layers()
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
        assert nonzero_inactive(sparsifier, *pair) == 0


def test_a_closure_called_several_times_counts_once():
    class Thrice(torch.optim.SGD):
        def step(self, closure):
            for _ in range(3):
                loss = closure()
            super().step()
            return loss

    kept = []
    for kind in (torch.optim.SGD, Thrice):
        model = three_layers()
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
    model = three_layers()
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.randn(8, 12)).square().mean().backward()
    place = (~sparsifier.masks["0.weight"]).nonzero()[0]
    model[0].weight.grad[tuple(place)] = float("inf")
    assert torch.isfinite(sparsifier.clip_grad_norm_(0.01))
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
