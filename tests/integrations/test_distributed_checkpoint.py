"""Sharded checkpoints: what two ranks write goes on with any number of ranks as if nothing had happened."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import granet
import together
from granet.integrations import distributed_checkpoint
from granet.ranks import leave
from granet.sparsifier import attachment

SETTINGS = {
    "granet": {"sparsity": 0.9, "initial_sparsity": 0.4, "end": 12, "total": 20, "interval": 3},
    "rigl": {"sparsity": 0.8, "end": 15, "interval": 4, "accumulate": 3},  # keeps gradients
    "deep-r": {"sparsity": 0.8, "l1": 0.01, "temperature": 1e-5},  # remembers a tensor of each weight's shape
    "dsr": {"sparsity": 0.8, "total": 30, "interval": 3, "threshold": 0.02},  # remembers a number
}
SAVED, STEPS = 10, 17


class Run:
    """A network in training, sharded if there are ranks."""

    def __init__(self, name, *, shard=True, seed=5):
        torch.manual_seed(seed)
        self.name = name
        self.model = nn.Sequential(nn.Linear(7, 18), nn.ReLU(), nn.Linear(18, 18), nn.ReLU(), nn.Linear(18, 3)).double()
        if shard:
            fully_shard(self.model[0])
            fully_shard(self.model)
        self.sparsifier = granet.Sparsifier(self.model, granet.METHODS[name](**SETTINGS[name]), seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sparsifier.attach(self.optimizer)

    def train(self, steps, rank=0, world=1):
        while self.sparsifier.step < steps:
            rng = torch.Generator().manual_seed(self.sparsifier.step)
            x, y = torch.randn(8, 7, generator=rng, dtype=torch.float64), torch.randint(0, 3, (8,), generator=rng)
            nn.functional.cross_entropy(self.model(x[rank::world]), y[rank::world]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def parts(self):
        return self.model, self.optimizer, self.sparsifier

    def equals(self, other):
        assert self.sparsifier.step == other.sparsifier.step
        assert self.sparsifier.version == other.sparsifier.version
        assert self.sparsifier.exploration == other.sparsifier.exploration
        for name, mask in self.sparsifier.masks.items():
            assert torch.equal(unsharded(mask), unsharded(other.sparsifier.masks[name])), (self.name, name)
        for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(unsharded(a.detach()), unsharded(b.detach()), rtol=1e-9, atol=1e-11)


def unsharded(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def begin(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(str(folder / f"s{world}"), world))


def write(rank, world, folder):
    begin(rank, world, folder)
    for name in SETTINGS:
        run = Run(name)
        distributed_checkpoint.save(folder / f"{name}-at-first", *run.parts())  # no step, though torch fills the state
        assert run.sparsifier.step == 0 and run.sparsifier.version == 0
        run.train(SAVED, rank, world)
        distributed_checkpoint.save(folder / name, *run.parts())
        run.train(STEPS, rank, world).equals(Run(name, shard=False).train(STEPS))

        # states in memory: whole tensors into shards, shards into whole ones
        alone = Run(name, shard=False).train(SAVED)
        mixed = Run(name, seed=7)
        with torch.no_grad():
            for p, q in zip(mixed.model.parameters(), alone.model.parameters(), strict=True):
                p.copy_(granet.shards.shard(q.detach(), p))
        mixed.sparsifier.load_state_dict(alone.sparsifier.state_dict())
        back = Run(name, shard=False, seed=8)
        back.model.load_state_dict(alone.model.state_dict())
        back.sparsifier.load_state_dict(mixed.sparsifier.state_dict())
        for one in (mixed, back):
            for part in ("masks", "ever", "gradients", "memory"):
                expected, found = alone.sparsifier.state_dict()[part], one.sparsifier.state_dict()[part]
                assert expected.keys() == found.keys()
                assert all(torch.equal(unsharded(found[key]), value) for key, value in expected.items())
        assert type(back.sparsifier.masks["0.weight"]) is torch.Tensor
    leave()


def go_on(rank, world, folder):
    begin(rank, world, folder)
    for name in SETTINGS:
        run = Run(name, seed=9)
        distributed_checkpoint.load(folder / name, *run.parts())
        assert run.sparsifier.step == SAVED
        run.train(STEPS, rank, world).equals(Run(name, shard=False).train(STEPS))
    leave()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    together.start(write, 2, folder)
    return folder


@pytest.mark.slow
def test_four_ranks_go_on_where_two_saved(written):
    together.start(go_on, 4, written)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_process_goes_on_where_two_saved(written, name):
    run = Run(name, shard=False, seed=9).train(3)
    distributed_checkpoint.load(written / name, *run.parts())
    assert run.sparsifier.step == SAVED
    run.train(STEPS).equals(Run(name, shard=False).train(STEPS))


def test_a_checkpoint_of_another_method_is_refused(written):
    with pytest.raises(ValueError, match="the state is of GraNet"):
        distributed_checkpoint.load(written / "granet", *Run("dsr", shard=False).parts())


def test_hooks_are_left_out_and_come_back():
    run = Run("granet", shard=False)
    with attachment.unhooked(run.optimizer):
        run.optimizer.step()
    assert run.sparsifier.step == 0
    run.train(1)
    assert run.sparsifier.step == 1
