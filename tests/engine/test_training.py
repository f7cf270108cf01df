import copy
import pickle
import time

import pytest
import torch
from small_models import problem
from torch import nn

import granet
from granet.engine import layer, timing, training
from granet.engine.training import accelerate


def train(method, *, sparse, steps=24):
    """Masks after every step, losses, weights and the plan, if the engine was asked for."""
    model, x, y = problem()
    sparsifier = granet.Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    plan = accelerate(sparsifier, x) if sparse else None
    masks, losses = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        masks.append({name: mask.clone() for name, mask in sparsifier.masks.items()})
        losses.append(loss.item())
    return masks, losses, model, plan


METHODS = {
    "granet": granet.GraNet(sparsity=0.9, initial_sparsity=0.5, end=16, total=24, interval=4),
    "rigl": granet.RigL(sparsity=0.8, end=20, interval=5),
    "set": granet.SET(sparsity=0.8, total=24, interval=5),
    "gmp": granet.GMP(sparsity=0.9, end=20, interval=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_follows_the_masked_dense_run(name, always_sparse):
    masks, losses, model, _ = train(METHODS[name], sparse=False)
    sparse_masks, sparse_losses, sparse_model, plan = train(METHODS[name], sparse=True)
    assert all(row.chosen == "sparse" for row in plan.report().layers)
    for step, (a, b) in enumerate(zip(masks, sparse_masks, strict=True)):
        assert all(torch.equal(a[n], b[n]) for n in a), f"the masks differ after step {step + 1}"
    assert sparse_losses == pytest.approx(losses, rel=1e-3)
    for (n, p), q in zip(model.named_parameters(), sparse_model.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-4, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def test_parameters_stay_and_remove_undoes(always_sparse):
    model, x, _ = problem()
    before = dict(model.named_parameters())
    buffers = torch.random.get_rng_state()
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.8))
    plan = accelerate(sparsifier, x)
    assert torch.equal(torch.random.get_rng_state(), buffers)
    assert all(before[n] is p for n, p in model.named_parameters())
    assert isinstance(model[2].forward, layer.Forward)
    expected = model(x)
    plan.remove()
    assert not any("forward" in module.__dict__ for module in model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert plan.report().layers == ()


def test_copies_of_an_accelerated_model_are_plain(always_sparse):
    model, x, _ = problem()
    accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.8)), x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin[0].weight.zero_()
            assert not isinstance(twin[0].forward, layer.Forward)
            assert not torch.equal(twin(x), model(x))
            model_weight = model[0].weight.clone()
            model[0].weight.zero_()
            torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-4)
            model[0].weight.copy_(model_weight)


def test_layers_are_planned_anew_as_density_falls(monkeypatch):
    monkeypatch.setattr(timing, "NOISE", -1e9)
    method = granet.GMP(sparsity=0.95, end=12, interval=3)
    *_, plan = train(method, sparse=True, steps=16)
    rows = plan.report().layers
    assert [row.chosen for row in rows].count("sparse") >= 2
    assert all((row.chosen == "sparse") == (row.density <= layer.HOPELESS) for row in rows)
    assert min(row.density for row in rows) < 0.2
    assert "run sparse" in str(plan.report())


def test_the_gradient_is_dense_where_an_update_needs_it(always_sparse):
    model, x, y = problem()
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, end=20, interval=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    accelerate(sparsifier, x)
    for _ in range(6):
        due = sparsifier.dense_grad_due
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        outside = model[2].weight.grad[~sparsifier.masks["2.weight"]]
        assert bool(outside.any()) == due
        optimizer.step()


def test_what_the_kernels_do_not_take_runs_dense(always_sparse):
    model, x, _ = problem()
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.8))
    accelerate(sparsifier, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"Double|dtype|type"):
        model[0](x.double())  # as without the engine: torch's own message
    assert model(x[:5]).shape == (5, 10)
    assert model(x[:0]).shape == (0, 10)


def test_layers_of_one_shape_are_measured_once():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)])
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.9, distribution="uniform"))
    plan = accelerate(sparsifier, torch.randn(8, 32, 8, 8, requires_grad=True))
    rows = plan.report().layers
    assert len({(row.dense_ms, row.sparse_ms) for row in rows}) == 1
    assert rows[0].dense_ms is not None


def test_where_nothing_wins_the_report_says_so(monkeypatch):
    alike = timing.Spread(1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(timing.Timings, "measure", lambda self, calls: [alike] * len(calls))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.6)), torch.randn(4, 8))
    assert [row.chosen for row in plan.report().layers] == ["dense", "dense"]
    assert "Nothing wins" in str(plan.report())


def test_the_whole_model_has_the_last_word(monkeypatch):
    """The layers are measured as if the sparse kernels won, and the whole as if it lost."""
    dense, sparse = timing.Spread(9.0, 9.0, 9.0, 1), timing.Spread(1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(
        timing.Timings, "measure", lambda self, calls: [dense if key[-1] == "dense" else sparse for key in calls]
    )
    whole = {"dense": dense, "sparse": timing.Spread(9.0, 10.0, 11.0, 1)}
    monkeypatch.setattr(training, "wall_times", lambda calls: {name: (calls[name](), whole[name])[1] for name in calls})
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    sparsifier, x = granet.Sparsifier(model, granet.Static(sparsity=0.6)), torch.randn(4, 8)
    buffers = torch.random.get_rng_state()
    plan = accelerate(sparsifier, x)
    report = plan.report()
    assert all(row.chosen == "dense" and "not in the whole model" in row.why for row in report.layers)
    assert not any(forward.runs_sparse for forward in plan.forwards)
    assert report.whole == whole
    assert "nothing wins, all layers run dense" in str(report)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), buffers)


def test_measuring_leaves_buffers_and_modes_alone(always_sparse):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Dropout())
    model[4].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.9)), torch.randn(4, 3, 9, 9))
    before |= {name: value.clone() for name, value in model.state_dict().items() if name.endswith("weight")}
    plan.replan()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model[4].training
    assert plan.report().whole_dense_ms > 0


def scores_at_the_first_update(*, sparse=False, perturbed=False):
    """Magnitudes by which the first update of a network with batch norm chooses, and the masks it chooses."""
    torch.manual_seed(0)
    convolutions = [(3, 32), (32, 64), (64, 64), (64, 64)]
    blocks = [m for a, b in convolutions for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    if perturbed:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn_like(p))
    method = granet.GraNet(sparsity=0.9, initial_sparsity=0.6, end=20, total=40, interval=10, regeneration=0.0)
    sparsifier = granet.Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer, hooks=False)
    if sparse:
        plan = accelerate(sparsifier, x)
        assert sum(row.chosen == "sparse" for row in plan.report().layers) >= 3
    while sparsifier.version == 0:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        sparsifier.before_step()
        optimizer.step()
        scores = {name: p.detach().abs().clone() for name, p in model.named_parameters() if name in sparsifier.masks}
        sparsifier.after_step()
    return [torch.cat([t[name].flatten() for name in scores]) for t in (scores, sparsifier.masks)]


def test_masks_differ_by_rounding_alone_under_batch_norm(always_sparse):
    """Batch norm makes the course hang on the last bits: a change of all weights by 1e-6 changes masks.

    Sparse kernels round in another way and change less; as a rule no mask entry differs.
    """
    scores, masks = scores_at_the_first_update()
    perturbed_scores, perturbed_masks = scores_at_the_first_update(perturbed=True)
    fast_scores, fast_masks = scores_at_the_first_update(sparse=True)
    assert not torch.equal(scores, fast_scores) and not torch.equal(masks, perturbed_masks)
    assert (fast_scores - scores).abs().max() < (perturbed_scores - scores).abs().max()
    assert (fast_masks != masks).sum() <= (perturbed_masks != masks).sum()


def test_the_report_has_every_module_with_parameters_and_the_reason(always_sparse):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.lstm = nn.LSTM(16, 16, batch_first=True)
            self.up = nn.ConvTranspose1d(16, 16, 3, padding=1)
            self.ring = nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular")
            self.norm = nn.LayerNorm(16)
            self.own, self.wrapped, self.unused = Own(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.runs = nn.Linear(16, 16)
            self.head, self.tied = nn.Linear(16, 4), nn.Linear(16, 16)
            self.tied.weight = self.runs.weight
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, tokens):
            x = self.lstm(self.embed(tokens))[0].transpose(1, 2)
            x = self.norm(self.ring(self.up(x)).transpose(1, 2))
            x = self.tied(self.runs(self.own(x))) * self.scale
            return self.head(x + self.wrapped(x))

    model = Model()
    model.wrapped.forward = lambda x: x
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.5), skip="head")
    report = accelerate(sparsifier, torch.randint(0, 10, (4, 8))).report()
    reasons = {row.name: f"{row.chosen}: {row.why}" for row in report.layers}
    kinds = "none of Linear, Conv1d, Conv2d"
    assert reasons == {
        "": "dense: Model has no sparse weight",
        "embed": "dense: Embedding has no sparse weight",
        "lstm": f"dense: a LSTM is {kinds}",
        "up": f"dense: a ConvTranspose1d is {kinds}",
        "ring": "dense: padding mode 'circular' is not zeros",
        "norm": "dense: LayerNorm has no sparse weight",
        "own": "dense: a Own has a forward of its own",
        "wrapped": "dense: its forward was exchanged by somebody else",
        "unused": "dense: the model does not call it with the example inputs",
        "runs": "sparse: faster",
        "head": "dense: Linear has no sparse weight",
        "tied": "dense: it shares its weight with 'runs.weight'",
    }
    assert next(row for row in report.layers if row.name == "lstm").density == pytest.approx(0.5, abs=0.2)
    assert "lstm" in str(report) and "1 more without a matrix of weights: LayerNorm has no sparse weight" in str(report)
    again = accelerate(sparsifier, torch.randint(0, 10, (4, 8))).report()
    assert "accelerated by another plan: call remove() of that one first" in str(again)


def test_a_method_with_other_weights_has_the_reason_in_every_row():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = granet.Sparsifier(model, granet.TopKAST(sparsity=0.5, backward_sparsity=0.2))
    rows = accelerate(sparsifier, torch.randn(2, 8)).report().layers
    assert len(rows) == 2 and all("trains other weights" in row.why for row in rows)


def test_both_are_warm_before_the_whole_model_is_timed(always_sparse, monkeypatch):
    """A network whose first calls are slow, as those of a fresh process are, is not reported to gain by that."""
    calls = {"dense": 0, "sparse": 0}
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.6))
    plan = accelerate(sparsifier, torch.randn(4, 8))

    def slow_at_first(name):
        def call():
            calls[name] += 1
            time.sleep(0.05 if calls[name] <= 2 else 0.005)

        return call

    monkeypatch.setattr(plan, "candidates", lambda: {name: slow_at_first(name) for name in calls})
    plan.replan()
    report = plan.report()
    assert calls["dense"] == calls["sparse"] == report.whole["dense"].runs + 2
    for spread in report.whole.values():
        assert 5 <= spread.least <= spread.median <= spread.most and spread.median < 40
    assert f"{report.whole_dense_ms:.2f} ms (median" in str(report) and "x by the median" in str(report)


def test_a_model_whose_output_has_no_gradient_is_planned(always_sparse):
    class Decides(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1)

    model = Decides(nn.Linear(8, 8))
    plan = accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.6)), torch.randn(4, 8))
    assert plan.report().layers[0].chosen == "sparse"


def test_measuring_puts_buffers_back_that_a_forward_changes_in_evaluation_too(always_sparse):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.register_buffer("calls", torch.zeros(()))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.a = nn.Linear(8, 8), Counting()

        def forward(self, x):
            self.a.calls += 1
            return self.layer(x)

    model = Model()
    accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.6), skip="a"), torch.randn(4, 8))
    assert model.a.calls == 0
