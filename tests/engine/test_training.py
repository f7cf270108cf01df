import copy
import pickle

import pytest
import torch
from torch import nn

import granet
from granet.engine import training
from granet.engine.training import accelerate


def problem(seed=0):
    """A small network without normalisation, whose course does not hang on the last bit, and its data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip
    return model, torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))


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


@pytest.fixture
def always_sparse(monkeypatch):
    """Layers run sparse whatever the measurement says, so that the test does not hang on it."""
    monkeypatch.setattr(training, "NOISE", -1e9)
    monkeypatch.setattr(training, "HOPELESS", 1.0)


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
    assert isinstance(model[2].forward, training.Forward)
    expected = model(x)
    plan.remove()
    assert "forward" not in model[2].__dict__
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert plan.report().layers == ()


def test_copies_of_an_accelerated_model_are_plain(always_sparse):
    model, x, _ = problem()
    accelerate(granet.Sparsifier(model, granet.Static(sparsity=0.8)), x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin[0].weight.zero_()
            assert not isinstance(twin[0].forward, training.Forward)
            assert not torch.equal(twin(x), model(x))
            model_weight = model[0].weight.clone()
            model[0].weight.zero_()
            torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-4)
            model[0].weight.copy_(model_weight)


def test_layers_are_planned_anew_as_density_falls(monkeypatch):
    monkeypatch.setattr(training, "NOISE", -1e9)
    method = granet.GMP(sparsity=0.95, end=12, interval=3)
    *_, plan = train(method, sparse=True, steps=16)
    rows = plan.report().layers
    assert [row.chosen for row in rows].count("sparse") >= 2
    assert all((row.chosen == "sparse") == (row.density <= training.HOPELESS) for row in rows)
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
