"""Real processes, gloo: the same masks as one process has, whatever the number of ranks and the way of sharding."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import granet
import together
from granet.ranks import leave

CHT = {"initial_sparsity": None, "soft": False, "predictor": "ch3-l3p", "anneal": False}
SETTINGS = {
    "static": {"sparsity": 0.8},
    "gmp": {"sparsity": 0.9, "end": 12, "interval": 3},
    "gmp layerwise": {"sparsity": 0.9, "end": 12, "interval": 3, "scope": "layerwise"},
    "granet": {"sparsity": 0.9, "initial_sparsity": 0.4, "end": 12, "total": 20, "interval": 3},
    "rigl": {"sparsity": 0.8, "end": 15, "interval": 3},
    "rigl accumulate": {"sparsity": 0.8, "end": 15, "interval": 3, "accumulate": 2},
    "rigl momentum": {"sparsity": 0.8, "end": 15, "interval": 3, "growth": "momentum"},
    "rigl-itop": {"sparsity": 0.8, "total": 30, "interval": 3},
    "srigl": {"sparsity": 0.8, "end": 15, "interval": 3},
    "set": {"sparsity": 0.8, "total": 20, "interval": 3},
    "set by-sign": {"sparsity": 0.8, "total": 20, "interval": 3, "by_sign": True},
    "snfs": {"sparsity": 0.8, "total": 30, "interval": 3},
    "deep-r": {"sparsity": 0.8, "l1": 0.01, "temperature": 1e-5},
    "dsr": {"sparsity": 0.8, "total": 30, "interval": 3, "threshold": 0.02},
    "mest": {"sparsity": 0.8, "halve": 9, "end": 15, "interval": 3},
    "mest soft": {"sparsity": 0.8, "halve": 9, "end": 15, "interval": 3, "soft_bound": True},
    "chtss": {"sparsity": 0.9, "initial_sparsity": 0.4, "end": 12, "interval": 3, "relative_importance": 0.5},
    "chtss cht": {**CHT, "sparsity": 0.8, "end": 20, "interval": 3, "receptive_field": 0.4},
    "ac-dc": {"sparsity": 0.8, "begin": 3, "interval": 3, "end": 12},
    "fixed": {},
    "str": {"s_init": -3.0, "interval": 3},
    "top-kast": {"sparsity": 0.8, "interval": 3},
    "feather": {"sparsity": 0.8, "end": 12},
    "cyclic": {"sparsity": 0.8, "end": 12, "total": 20, "interval": 3},
}
SHARDED = [name for name in SETTINGS if name not in ("srigl", "str", "top-kast", "feather")]
QUICK = [
    "gmp layerwise",
    "chtss",
    "granet",
    "rigl accumulate",
    "rigl momentum",
    "set by-sign",
    "deep-r",
    "mest soft",
    "fixed",
]
STEPS = 16


def method(name):
    return granet.METHODS[name.split()[0]](**SETTINGS[name])


def network(pruned=False):
    """Layers that divide by nothing; the last has fewer rows than there are ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 18), nn.ReLU(), nn.Linear(18, 18), nn.ReLU(), nn.Linear(18, 14), nn.ReLU(), nn.Linear(14, 3)
    ).double()
    for p in model.parameters():
        p.data[p.abs() < p.abs().median() * pruned] = 0
    return model


def batch(step, part=slice(None)):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(8, 7, generator=rng, dtype=torch.float64)
    return x[part], torch.randint(0, 3, (8,), generator=rng)[part]


def train(model, sparsifier, optimizer, part=slice(None), steps=STEPS):
    """The norms of the gradient at each step."""
    norms = []
    for step in range(sparsifier.step, steps):
        x, y = batch(step, part)
        nn.functional.cross_entropy(model(x), y).backward()
        norms.append(float(sparsifier.clip_grad_norm_(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def alone(name):
    model = network(pruned=name == "fixed")
    sparsifier = granet.Sparsifier(model, method(name), seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    return model, sparsifier, train(model, sparsifier, optimizer)


def unsharded(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def prepare(kind, world, pruned=False):
    """The network as the ranks hold it, and the part of the batch that this rank sees."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = network(pruned)
    if kind == "ddp":
        return model, world, dist.get_rank()
    if kind == "fsdp":
        for layer in model[:4:2]:
            fully_shard(layer)
        fully_shard(model)
        return model, world, dist.get_rank()
    if kind == "hybrid":  # replicated over one dimension, sharded over the other
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model, world, dist.get_rank()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(
        model,
        mesh["tp"],
        {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()},
    )
    fully_shard(model, mesh=mesh["dp"])
    return model, world // 2, mesh["dp"].get_local_rank()


def begin(rank, world, folder, **options):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, **options)


def equal_to_one_process(rank, world, folder, kind, names):
    begin(rank, world, folder)
    for name in names:
        model, parts, mine = prepare(kind, world, pruned=name == "fixed")
        sparsifier = granet.Sparsifier(model, method(name), seed=5, verify_every=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier.attach(optimizer)
        forward = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
        size = 8 // parts
        norms = train(forward, sparsifier, optimizer, slice(mine * size, (mine + 1) * size))
        expected, other, other_norms = alone(name)
        assert norms == pytest.approx(other_norms, rel=1e-9)
        assert str(sparsifier.report()) == str(other.report())
        assert sparsifier.counts == other.counts
        assert sparsifier.exploration == other.exploration
        assert sparsifier.last_update == other.last_update
        reference = dict(expected.named_parameters())
        for key, mask in sparsifier.masks.items():
            assert torch.equal(unsharded(mask), other.masks[key]), (name, key)
        for key, p in model.named_parameters():
            torch.testing.assert_close(unsharded(p.detach()), reference[key].detach(), rtol=1e-9, atol=1e-11)
            if key in sparsifier.trained:
                for value in optimizer.state[p].values():
                    if value.shape == p.shape:
                        assert not unsharded(value)[~unsharded(sparsifier.trained[key])].any()
    leave()


@pytest.mark.parametrize(
    ("kind", "world", "names"),
    [
        ("ddp", 2, ["granet", "rigl accumulate", "srigl", "set", "deep-r", "str", "top-kast", "feather"]),
        ("fsdp", 2, QUICK),
        pytest.param("fsdp", 2, [name for name in SHARDED if name not in QUICK], marks=pytest.mark.slow),
        ("fsdp", 4, ["granet"]),
        pytest.param("hybrid", 4, ["granet"], marks=pytest.mark.slow),
        ("tensor-parallel", 4, ["granet"]),
        pytest.param("tensor-parallel", 4, ["set"], marks=pytest.mark.slow),
    ],
)
def test_masks_and_weights_equal_those_of_one_process(kind, world, names, tmp_path):
    together.start(equal_to_one_process, world, tmp_path, kind, names)


def make(method, *, model=None, **options):
    """A sparsifier on a network of its own, with its optimizer."""
    model = network() if model is None else model
    sparsifier = granet.Sparsifier(model, method, **options)
    return sparsifier, torch.optim.SGD(model.parameters(), lr=0.1)


def step(sparsifier, optimizer):
    x, y = batch(sparsifier.step)
    nn.functional.cross_entropy(sparsifier.model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def an_inner_optimizer_has_a_part_of_the_state(rank, world, tmp_path):
    """ZeroRedundancyOptimizer keeps the state of some parameters on each rank, in an optimizer inside of it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    begin(rank, world, tmp_path)
    runs = []
    for alone in (True, False):
        model = network()
        sparsifier = granet.Sparsifier(
            model, granet.RigL(sparsity=0.8, end=15, interval=3), verify_every=0 if alone else 1
        )
        whole = torch.optim.Adam(model.parameters(), lr=1e-3)
        optimizer = whole if alone else ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-3)
        sparsifier.attach(optimizer)
        network_ = model if alone else DistributedDataParallel(model)
        part = slice(None) if alone else slice(rank * 8 // world, (rank + 1) * 8 // world)
        for step in range(STEPS):
            x, y = batch(step, part)
            nn.functional.cross_entropy(network_(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert sparsifier.step == step + 1
            inner = optimizer if alone else optimizer.optim
            for name, mask in sparsifier.masks.items():
                p = model.get_parameter(name)
                held = [p.detach(), *(v for v in inner.state.get(p, {}).values() if v.shape == p.shape)]
                assert not any(tensor[~mask].any() for tensor in held)
        runs.append((model, sparsifier))
    (plain, one), (model, other) = runs
    assert one.version == other.version > 2
    assert all(torch.equal(one.masks[name], mask) for name, mask in other.masks.items())
    torch.testing.assert_close(dict(plain.named_parameters()), dict(model.named_parameters()))
    leave()


def test_an_inner_optimizer_with_a_part_of_the_state(tmp_path):
    together.start(an_inner_optimizer_has_a_part_of_the_state, 2, tmp_path)


def differences_are_found(rank, world, folder):
    begin(rank, world, folder)

    # other seeds: at once, unless nobody is to look
    sparsifier, optimizer = make(method("static"), seed=rank)
    with pytest.raises(RuntimeError, match=r"'0.weight' on rank 1 is not that of rank 0. Give the sparsifier the same"):
        sparsifier.attach(optimizer)
    sparsifier, optimizer = make(method("static"), seed=rank, verify_every=0)
    sparsifier.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"'0.weight' on rank 1"):
        sparsifier.verify()

    # other weights: when masks are made of them
    sparsifier, optimizer = make(method("gmp"), verify_every=2)
    with torch.no_grad():
        sparsifier.model[4].weight[3] *= 1 + 5 * rank
    sparsifier.attach(optimizer)
    for _ in range(5):
        step(sparsifier, optimizer)
    with pytest.raises(RuntimeError, match=r"'\d.weight' on rank 1"):
        step(sparsifier, optimizer)
    assert sparsifier.step == 6

    # where all masks are equal: the generator, the step
    sparsifier, optimizer = make(granet.Dense(), seed=rank)
    with pytest.raises(RuntimeError, match="'generator' on rank 1"):
        sparsifier.attach(optimizer)
    sparsifier, optimizer = make(granet.Dense())
    sparsifier.attach(optimizer)
    for _ in range(1 + rank):
        step(sparsifier, optimizer)
    with pytest.raises(RuntimeError, match="'step' on rank 1"):
        sparsifier.verify()

    # other parameters, which no order of messages could compare
    sparsifier, optimizer = make(method("static"), skip=["0"][:rank])
    with pytest.raises(RuntimeError, match=r"different sparse parameters, \[4, 3\] of them; .*verify_every=0"):
        sparsifier.attach(optimizer)

    # in shards: each rank has its own part
    model, *_ = prepare("fsdp", world)
    sparsifier, optimizer = make(method("static"), model=model, seed=rank)
    with pytest.raises(RuntimeError, match="'generator' on rank 1"):
        sparsifier.attach(optimizer)
    leave()


def test_differences_between_ranks_are_found_on_all_of_them(tmp_path):
    together.start(differences_are_found, 2, tmp_path)


def what_cannot_be_sharded_is_refused(rank, world, folder):
    from granet.probe import Probe

    begin(rank, world, folder)
    model, *_ = prepare("fsdp", world)
    for name in ("str", "top-kast", "feather"):
        with pytest.raises(ValueError, match=f"'0.weight' is sharded over ranks: {type(method(name)).__name__} cannot"):
            granet.Sparsifier(model, method(name))
    with pytest.raises(ValueError, match=r"'0.weight' is sharded, .* only the pattern 'unstructured', not 1:2"):
        granet.Sparsifier(model, granet.Static(sparsity=0.5), pattern="1:2", skip="6")
    with pytest.raises(ValueError, match=r"'0.weight' is sharded over ranks, and a constant fan-in .* such as RigL"):
        granet.Sparsifier(model, granet.SRigL(sparsity=0.5, end=10))
    for kind in ("snip", "grasp", "synflow"):
        chosen = granet.METHODS[kind](sparsity=0.8)
        with pytest.raises(ValueError, match=f"{type(chosen).__name__} looks at gradients .* masks=masks"):
            granet.Sparsifier(model, chosen, probe=Probe(model, [batch(0)]))
    # as the message says
    before = network()
    masks = granet.Sparsifier(before, chosen, probe=Probe(before, [batch(0)])).masks
    sharded = granet.Sparsifier(model, chosen, masks=masks).masks
    assert all(torch.equal(unsharded(sharded[name]), mask) for name, mask in masks.items())
    leave()


def test_what_cannot_be_sharded_is_refused_with_what_to_do(tmp_path):
    together.start(what_cannot_be_sharded_is_refused, 2, tmp_path)


def one_fails_in_an_update(rank, world, folder, way):
    begin(rank, world, folder, timeout=timedelta(seconds=15))

    @dataclass(frozen=True, kw_only=True)
    class Failing(granet.RigL):
        def update(self, *args):
            if rank == 1:
                (folder / "at").touch()
                os._exit(0) if way == "dies" else time.sleep(600)
            return super().update(*args)

    model, *_ = prepare("fsdp", world)
    sparsifier, optimizer = make(Failing(**SETTINGS["rigl"]), model=model)
    sparsifier.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"gloo|onnection|imed out"):
        for _ in range(3):
            step(sparsifier, optimizer)
    assert sparsifier.step == 3 and (folder / "at").exists()
    os._exit(7)  # a group that lost a member cannot be ended in order


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_a_rank_lost_in_an_update_ends_the_others_with_an_error(way, tmp_path):
    context = together.context()
    ranks = [context.Process(target=one_fails_in_an_update, args=(rank, 2, tmp_path, way)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(240)
    ended = ranks[0].exitcode
    for process in ranks:
        process.kill()
        process.join()
    assert ended == 7
