"""The n best of many scores: those that sorting everything finds, on the CPU, another device, and in shards."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given as cases
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

import together
from granet import native, ranking
from granet.criterion import Layer, magnitude, own_values
from granet.ranking import NonFiniteScores
from granet.ranks import leave
from granet.topology import count, drop, grow, top

SCORES = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 1.0, 3.5, 7.25]), min_size=1, max_size=40)


def naive_top(scores, n, among):
    """The same by sorting everything: highest score first, then first position."""
    order = sorted((-s, i) for i, (s, c) in enumerate(zip(scores, among, strict=True)) if c)
    chosen = {i for _, i in order[:n]}
    return [i in chosen for i in range(len(scores))]


@pytest.fixture(params=["numpy", "kernel", "other device"])
def engine(request, monkeypatch):
    """The ways to select: on the CPU in NumPy and in the compiled kernel, and on other devices (that runs here too)."""
    if request.param == "other device":
        monkeypatch.setattr(ranking, "top_cpu", ranking.top_device)
    elif request.param == "kernel" and not native.available():
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(native, "ready", lambda: request.param == "kernel")


@cases(SCORES, st.data())
def test_top_equals_the_naive_version(scores, data):
    among = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    n = data.draw(st.integers(0, sum(among)))
    cut = data.draw(st.integers(0, len(scores)))
    expected = naive_top(scores, n, among)
    pieces = [(scores[:cut], among[:cut]), (scores[cut:], among[cut:])]
    layers = [Layer(torch.tensor(s, dtype=torch.float32)) for s, _ in pieces]
    masks = [torch.tensor(m, dtype=torch.bool) for _, m in pieces]
    for select in (ranking.top_cpu, ranking.top_device):
        if 0 < n < sum(among):
            assert torch.cat(select(layers, own_values, n, masks, sum(among))).tolist() == expected
    assert torch.cat(top(layers, own_values, n, masks)).tolist() == expected


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "sorted", "one outlier", "float64"])
def test_top_of_many_scores_is_exact(kind, engine):
    """Large enough for the sampled bracket, on scores that are hard for it."""
    rng = np.random.default_rng(0)
    size = 300_000
    values = {
        "normal": rng.standard_normal(size),
        "ties": rng.integers(0, 4, size).astype(float),
        "constant": np.ones(size),
        "sorted": np.arange(size, dtype=float),
        "one outlier": np.where(np.arange(size) == 77_777, 1e30, 0.0),
        "float64": 1 + rng.standard_normal(size) * 1e-12,
    }[kind]
    scores = torch.tensor(values, dtype=torch.float64 if kind == "float64" else torch.float32)
    among = torch.tensor(rng.random(size) < 0.6)
    candidates = among.nonzero().squeeze(1)
    ranked = candidates[np.argsort(-scores[candidates].numpy(), kind="stable")]
    for n in (1, 5, 1_000, count(among) // 2, count(among) - 1):
        chosen = top(
            [Layer(scores[:100_001]), Layer(scores[100_001:])], own_values, n, [among[:100_001], among[100_001:]]
        )
        assert set(torch.cat(chosen).nonzero().squeeze(1).tolist()) == set(ranked[:n].tolist())


def test_a_bracket_that_misses_is_widened(monkeypatch, engine):
    monkeypatch.setattr(ranking, "_bracket", lambda *_: (0.9, 0.95))
    scores, among = torch.rand(1000), torch.ones(1000, dtype=torch.bool)
    for n in (10, 500, 999):
        expected = torch.zeros(1000, dtype=torch.bool)
        expected[scores.argsort(descending=True)[:n]] = True
        assert torch.equal(top([Layer(scores)], own_values, n, [among])[0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad, engine):
    scores = torch.randn(50)
    scores[13] = bad
    mask = torch.rand(50) < 0.5
    with pytest.raises(NonFiniteScores, match="NaN or infinite"):
        drop(mask, scores, 1)
    with pytest.raises(NonFiniteScores):
        grow(mask, scores, 1)


SHAPES = [(300, 37), (1, 5), (401, 300), (7,)]  # uneven in two shards; a part of one rank may be empty


def adversaries():
    """Scores of all layers together, by name."""
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(size, generator=generator)
    return {
        "normal": normal,
        "ties": torch.randint(-2, 3, (size,), generator=generator).float(),
        "constant": torch.ones(size),
        "one outlier": torch.where(torch.arange(size) == 77_777, 1e30, 0.0),
        "signed zeros": torch.where(normal > 0, 0.0, -0.0),
        "float64": 1 + normal.double() * 1e-12,
        "bfloat16": normal.bfloat16(),
        "sorted": torch.arange(size).float(),
    }


def equal_to_whole(rank, world, folder):
    """Every choice of shards is that of the whole tensors, without and with a bracket that misses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    mesh = init_device_mesh("cpu", (world,))
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    bracket = ranking._bracket_sharded

    def shards(flat):
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), SHAPES, strict=True)]
        return [distribute_tensor(part, mesh, [Shard(0)]) for part in parts[:-1]] + parts[-1:]  # the last is whole

    among = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(1)) < 0.6
    for name, scores in adversaries().items():
        for criterion in (own_values, magnitude) if name == "normal" else (own_values,):
            for n in (1, 1_000, count(among) // 2, count(among) - 1):
                layers = [Layer(part.view(shape)) for part, shape in zip(scores.split(sizes), SHAPES, strict=True)]
                masks = [part.view(shape) for part, shape in zip(among.split(sizes), SHAPES, strict=True)]
                expected = top(layers, criterion, n, masks)
                for miss in (None, (0.9, 0.95)):
                    ranking._bracket_sharded = bracket if miss is None else lambda *_, miss=miss: miss
                    found = top([Layer(part) for part in shards(scores)], criterion, n, shards(among))
                    for one, other in zip(found, expected, strict=True):
                        one = one.full_tensor() if hasattr(one, "full_tensor") else one
                        assert torch.equal(one, other), (name, criterion, n, miss)
    ranking._bracket_sharded = bracket

    wide = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = [part.view(shape) for part, shape in zip(wide.split(sizes), SHAPES, strict=True)]
    kinds = [part if i % 2 else part.float() for i, part in enumerate(parts)]  # layers of several types
    split = [part if i % 2 else part.float() for i, part in enumerate(shards(wide))]
    masks = [part.view(shape) for part, shape in zip(among.split(sizes), SHAPES, strict=True)]
    for n in (50, count(among) // 2):
        expected = top([Layer(part) for part in kinds], own_values, n, masks)
        found = top([Layer(part) for part in split], own_values, n, shards(among))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.full_tensor() if hasattr(one, "full_tensor") else one, other), n

    broken = shards(torch.randn(sum(sizes)))
    if rank == 1:
        broken[0].to_local()[0, 0] = float("nan")
    with pytest.raises(NonFiniteScores, match="on some rank"):  # on every rank, none waits for another
        top([Layer(part) for part in broken], own_values, 10, shards(among))
    leave()


def test_shards_choose_what_the_whole_does(tmp_path):
    together.start(equal_to_whole, 2, tmp_path)


def test_candidates_that_are_not_there_are_told_instead_of_looked_for():
    with pytest.raises(ValueError, match="fewer than 3"):
        top([Layer(torch.ones(4))], own_values, 3, [torch.tensor([True, True, False, False])], candidates=4)


class Placed(torch.Tensor):
    """A stand-in for a tensor on a GPU: it refuses to meet tensors of another place, as torch does, but for numbers."""

    @staticmethod
    def at(place, tensor):
        with torch._C.DisableTorchFunctionSubclass():
            placed = torch.Tensor._make_subclass(Placed, tensor.as_subclass(torch.Tensor))
        placed.place = place
        return placed

    @property
    def device(self):
        return SimpleNamespace(type="cuda", place=self.place)

    def to(self, device):
        return Placed.at(device.place, self.as_subclass(torch.Tensor))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
            places = {one.place for one in flat if isinstance(one, Placed)}
            if len(places) > 1:
                raise RuntimeError("Expected all tensors to be on the same device")
            found = func(*args, **kwargs or {})
            return tree_map_only(torch.Tensor, lambda t: Placed.at(*places, t.as_subclass(torch.Tensor)), found)


@cases(SCORES, SCORES, st.data())
def test_layers_on_several_devices_compete_as_on_one(first, second, data):
    n = data.draw(st.integers(1, len(first) + len(second) - 1))
    weights = [torch.tensor(first), torch.tensor(second)]
    everywhere = [torch.ones(len(weight), dtype=torch.bool) for weight in weights]
    expected = ranking.top([Layer(weight) for weight in weights], magnitude, n, everywhere, len(first) + len(second))
    layers = [Layer(Placed.at(i, weight)) for i, weight in enumerate(weights)]
    among = [Placed.at(i, mask) for i, mask in enumerate(everywhere)]
    found = ranking.top(layers, magnitude, n, among, len(first) + len(second))
    for place, (mask, right) in enumerate(zip(found, expected, strict=True)):
        assert mask.place == place and torch.equal(mask.as_subclass(torch.Tensor), right)
