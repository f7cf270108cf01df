"""Sparse storage trains what dense storage trains: the same masks and weights, whatever the loop does.

That is so to the bit on torch's own kernels, on which everything runs here. Those of granet round otherwise: they are
tested in test_kernels.py.
"""

import io
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from stored_training import METHODS, OPTIMIZERS, STEPS, Training, batch, network, pair
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import granet
import together
from granet import Sparsifier, ranks
from granet.sparsifier.sparse_storage import is_stored, linear
from granet.sparsifier.sparse_storage import weight as stored
from granet.sparsifier.sparse_storage.values import dense


@pytest.fixture(autouse=True)
def torchs_kernels(monkeypatch):
    monkeypatch.setattr(linear, "DENSEST", {})


def assert_equal(a, b, *, rounded=False):
    """Equal to the bit; `rounded`: but for the last one, where a fused kernel computes the rest of a vector apart."""
    assert all(torch.equal(mask, b.sparsifier.masks[name]) for name, mask in a.sparsifier.masks.items())
    one, other = a.model.state_dict(), b.model.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]) or (rounded and torch.allclose(value, other[name], atol=1e-6)), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_those_of_dense_storage_after_every_step(method, optimizer):
    dense, sparse = pair(method, optimizer)
    for _ in range(STEPS):
        assert_equal(dense.step(), sparse.step(), rounded="fused" in optimizer)
    assert dense.sparsifier.version == sparse.sparsifier.version
    assert (method == "static") == (sparse.sparsifier.version == 0)


def test_parameters_gradients_and_buffers_are_as_many_as_active_weights():
    run = Training("sparse", "granet", "adamw")
    for _ in range(STEPS):
        run.loss().backward()
        for name, values in run.sparsifier._parameters.items():
            assert values.shape == values.grad.shape == (run.sparsifier.counts[name],)
        run.optimizer.step()
        run.optimizer.zero_grad()
        for name, values in run.sparsifier._parameters.items():
            buffers = [b for b in run.optimizer.state[values].values() if b.numel() > 1]
            assert len(buffers) == 2 and all(b.shape == values.shape for b in buffers)
            assert values.shape == (run.sparsifier.counts[name],)
    assert run.sparsifier.active == granet.distribution.budget(run.sparsifier.total, 0.1)
    assert {id(p) for p in run.model.parameters()} >= {id(p) for p in run.sparsifier._parameters.values()}


@pytest.mark.parametrize("order", ["model, optimizer, sparsifier", "sparsifier, optimizer, model"])
@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(method, order):
    whole = Training("sparse", method, "adamw").step(10)
    file = io.BytesIO()
    torch.save({name: getattr(whole, name).state_dict() for name in ("model", "optimizer", "sparsifier")}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = Training("sparse", method, "adamw", seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in order.split(", "):
            getattr(resumed, name).load_state_dict(state[name])
        assert_equal(whole, resumed)
        for _ in range(STEPS - 10):
            assert_equal(whole.step(), resumed.step())


def test_dense_checkpoints_of_a_model_and_its_masks_go_on_in_sparse_storage():
    dense = Training("dense", "rigl").step(10)
    sparse = Training("sparse", "rigl", seed=3)
    sparse.model.load_state_dict(dense.model.state_dict())
    sparse.sparsifier.load_state_dict(dense.sparsifier.state_dict())
    assert_equal(dense, sparse)


def test_an_optimizer_state_of_dense_storage_is_refused_before_the_first_step():
    dense, sparse = (one.step(3) if one is None else one for one in pair("rigl", "adamw"))
    dense.step(3)
    sparse.optimizer.load_state_dict(dense.optimizer.state_dict())
    sparse.loss().backward()
    with pytest.raises(ValueError, match=r"AdamW keeps 'exp_avg' of shape .* cannot follow"):
        sparse.optimizer.step()


def test_what_is_loaded_beside_the_masks_is_lost_with_a_warning():
    run = Training("sparse", "static")
    run.model.load_state_dict(network().state_dict())
    with pytest.warns(RuntimeWarning, match=r"weights that the masks call inactive were not zero .* are lost"):
        run.step()


def test_masks_that_were_loaded_without_their_weights_are_warned_of():
    other = Training("sparse", "rigl", seed=5)
    run = Training("sparse", "rigl")
    run.sparsifier.load_state_dict(other.sparsifier.state_dict())
    with pytest.warns(RuntimeWarning, match="active weights that never were"):
        run.step()


@pytest.mark.parametrize("method", ["rigl", "granet", "rigl explore"])
def test_accumulated_gradients_grow_what_dense_storage_grows(method):
    runs = pair(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS):
            for run in runs:
                for part in (slice(0, 8), slice(8, 16)):
                    (run.loss(part) / 2).backward()
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=False)
            assert_equal(*runs)


def test_a_backward_that_is_thrown_away_does_not_count():
    """As in sharpness-aware training: the second gradient of a step is the one that counts."""
    runs = pair("rigl")
    for _ in range(STEPS):
        for run in runs:
            (-run.loss()).backward()
            run.optimizer.zero_grad()
            run.loss().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert_equal(*runs)


def test_a_first_step_in_two_parts_where_one_was_expected_is_warned_of():
    run = Training("sparse", "rigl").step(3)
    for part in (slice(0, 8), slice(8, 16)):
        (run.loss(part) / 2).backward()
    with pytest.warns(RuntimeWarning, match="several backwards"):
        run.optimizer.step()


def test_a_layer_that_is_used_twice_grows_by_both_gradients_from_the_second_update_on():
    """Whether a layer is shared within the forward is seen at the first update; the warning says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    sparsifier = Sparsifier(model, METHODS["rigl-itop"], storage="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)

    def step():
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(sparsifier.step))
        model(model(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.warns(RuntimeWarning, match="several uses of a layer"):
        for _ in range(4):
            step()
    for _ in range(3):
        step()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(sparsifier.step))
    model(model(x)).square().mean().backward()
    (found,) = sparsifier._stored.layers({}).values()
    weight = model[0].weight.detach().requires_grad_()
    once = torch.tanh(F.linear(x, weight, model[0].bias))
    torch.tanh(F.linear(once, weight, model[0].bias)).square().mean().backward()
    torch.testing.assert_close(found.grad, weight.grad)


@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_under_bfloat16_autocast_weights_are_those_of_dense_storage(method):
    runs = pair(method)
    for _ in range(STEPS):
        for run in runs:
            x, y = batch(run.sparsifier.step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(run.model(x), y)
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert_equal(*runs)


def test_clipping_and_averages_follow():
    runs = pair("granet", "adamw")
    averages, lists, dicts = [], [], []
    for run in runs:
        averages.append(AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        lists.append([p.detach().clone() for p in run.model.parameters()])
        dicts.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
        for follower in (averages[-1], lists[-1], dicts[-1]):
            run.sparsifier.follow(follower)
    for _ in range(STEPS):
        for run, average, listed, named in zip(runs, averages, lists, dicts, strict=True):
            run.loss().backward()
            norm = run.sparsifier.clip_grad_norm_(0.5)
            assert norm > 0
            run.optimizer.step()
            run.optimizer.zero_grad()
            average.update_parameters(run.model)
            for follower in (listed, named.values()):
                for mine, p in zip(follower, run.model.parameters(), strict=True):
                    mine.lerp_(p.detach(), 0.1)
        assert_equal(*runs)
        one, other = (average.module.state_dict() for average in averages)
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0)
    active = runs[1].sparsifier.counts["8.weight"]
    for name, at in (("8.values", "8.weight"),):
        assert dicts[1][name].shape == (active,)
        module = runs[1].model[8]
        whole = dense(dicts[1][name], module.positions, stored.shape_of(module))
        assert torch.equal(whole, dicts[0][at])
    assert [tuple(t.shape) for t in lists[1]] == [tuple(p.shape) for p in runs[1].model.parameters()]


def test_a_graph_that_lives_on_does_not_hinder_an_update_that_shrinks_the_values():
    run = Training("sparse", "granet")
    losses = []
    for _ in range(STEPS):
        losses.append(run.loss())
        losses[-1].backward(retain_graph=True)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.sparsifier.active < 0.2 * run.sparsifier.total


def test_fold_gives_a_plain_model():
    run = Training("sparse", "rigl").step(6)
    state, x = run.model.state_dict(), batch(0)[0]
    y = run.model.eval()(x)
    run.sparsifier.fold()
    assert not is_stored(run.model) and type(run.model[8]) is nn.Linear
    assert list(run.model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(run.model(x), y)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.sparsifier.attach(optimizer)
    F.cross_entropy(run.model(x), batch(0)[1]).backward()
    optimizer.step()
    assert not run.model[8].weight[~run.sparsifier.masks["8.weight"]].any()


def test_other_bad_input_is_refused():
    model = network()
    sparsifier = Sparsifier(model, METHODS["rigl"], storage="sparse")
    with pytest.raises(ValueError, match=r'LBFGS needs the matrix shape .* storage="dense"'):
        sparsifier.attach(torch.optim.LBFGS(model.parameters()))
    dense_copy = network()
    with pytest.raises(ValueError, match=r"'0\.values'"):
        sparsifier.follow(dense_copy)


def test_layers_that_cannot_be_stored_stay_dense():
    shared = nn.Linear(12, 12)
    model = nn.Sequential(
        shared, nn.ReLU(), nn.Linear(12, 12), nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
    )
    model[2].weight = shared.weight
    model.append(nn.Linear(12, 3))
    sparsifier = Sparsifier(model, granet.Static(sparsity=0.5), storage="sparse")
    assert list(sparsifier._stored.modules) == ["4.weight"]
    assert "0.weight" in sparsifier.masks and not model[0].weight[~sparsifier.masks["0.weight"]].any()


def test_a_gradient_that_is_not_finite_grows_nothing_and_loses_nothing():
    run = Training("sparse", "rigl-itop").step(3)
    before = {name: mask.clone() for name, mask in run.sparsifier.masks.items()}
    (run.loss() * float("nan")).backward()
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(RuntimeWarning, match="skipped, to be tried again"):
        run.optimizer.step()
    assert all(torch.equal(mask, before[name]) for name, mask in run.sparsifier.masks.items())
    run.optimizer.zero_grad()
    run.step()
    assert run.sparsifier.version == 1


def test_kernels_leave_stored_layers_alone_and_say_so():
    run = Training("sparse", "static")
    x, _ = batch(0)
    plan = granet.accelerate(run.sparsifier, x)
    rows = {row.name: row for row in plan.report().layers}
    assert rows["8"].why.startswith("in sparse storage") and rows["8"].shape == (40, 24)
    assert rows["8"].density == pytest.approx(run.sparsifier.counts["8.weight"] / 960)
    fast = granet.compile(run.model.eval(), x)
    assert fast.report().chosen == "dense" and "call fold()" in fast.report().why
    assert torch.equal(fast(x), run.model(x).detach())


def two_ranks(rank, world, folder, name):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    run = Training("sparse", name, "adamw", verify_every=1, doubles=True)
    replica = nn.parallel.DistributedDataParallel(run.model)
    half = slice(rank * 8, rank * 8 + 8)
    for _ in range(STEPS):
        x, y = batch(run.sparsifier.step)
        F.cross_entropy(replica(x[half].double()), y[half]).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    if rank == 0:
        torch.save((run.model.state_dict(), run.sparsifier.masks), folder / "state.pt")
    ranks.leave()


@pytest.mark.parametrize("name", ["rigl", "granet", "granet explore"])
def test_two_ranks_train_what_one_trains_with_the_whole_batch(name, tmp_path):
    together.start(two_ranks, 2, tmp_path, name)
    weights, masks = torch.load(tmp_path / "state.pt")
    one = Training("dense", name, "adamw", doubles=True)
    for _ in range(STEPS):
        x, y = batch(one.sparsifier.step)
        F.cross_entropy(one.model(x.double()), y).backward()
        one.optimizer.step()
        one.optimizer.zero_grad()
    assert all(torch.equal(mask, masks[key]) for key, mask in one.sparsifier.masks.items())
    for key, value in one.model.state_dict().items():
        if key.startswith("1."):
            continue
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-8)  # Adam divides by what is near zero
