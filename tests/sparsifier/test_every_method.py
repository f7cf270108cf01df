"""What holds when any method trains a network: clean state, exact counts, exact resuming."""

import copy
import io
import pickle
from math import prod

import pytest
import torch
from torch import nn

import granet
from granet import Probe, Sparsifier
from granet.selection import unfit
from granet.sparsifier.sparse_storage import weight as stored
from granet.sparsifier.sparse_storage.values import dense
from granet.topology import count
from method_settings import PATTERNED, STORED, VARIANTS, every, make

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}
STEPS = 30
KEPT = ("dense", "static", "snip", "grasp", "synflow", "fixed")  # methods whose topology training does not change
both = pytest.mark.parametrize("optimizer", OPTIMIZERS)
trained = pytest.mark.parametrize("variant", [*VARIANTS, *PATTERNED, *STORED])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )


def batch(step):
    rng = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 1, 8, 8, generator=rng), torch.randint(0, 3, (16,), generator=rng)


class Run:
    """A model in training; the loop of the README, one step at a time."""

    def __init__(self, variant, optimizer="sgd", seed=0):
        self.model = network()
        probe = Probe(self.model, [batch(-1), batch(-2)])
        _, pattern = PATTERNED.get(STORED.get(variant, variant), (variant, None))
        storage = "sparse" if variant in STORED else "dense"
        options = {"storage": storage, "probe": probe, "pattern": pattern, "skip": unfit(self.model, pattern)}
        method = make(variant)
        if method.sparsity_at(0) is None and not method.reparameterizes:  # it takes over the topology it finds
            for p in self.model.parameters():
                if p.ndim > 1:
                    p.data[p.abs() < p.abs().quantile(0.7)] = 0
        self.sparsifier = Sparsifier(self.model, method, seed=seed, **options)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier.attach(self.optimizer)
        self.loss = nn.CrossEntropyLoss()

    def step(self, spoil=None):
        x, y = batch(self.sparsifier.step)
        self.loss(self.model(x), y).backward()
        if spoil:
            spoil(self)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    def state(self):
        """All of it through a file, as a checkpoint would go."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), self.sparsifier.state_dict()], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def weight(self, name):
        """What the network computes with."""
        path, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf).detach()

    def live(self, name):
        """Where gradients count: at active weights, or where a method that reparameterizes says."""
        mask = self.sparsifier.masks[name]
        if not self.sparsifier.method.reparameterizes:
            return mask
        return getattr(self.model.get_submodule(name.rpartition(".")[0]), "trained", torch.ones_like(mask))

    def buffers(self, name):
        """All that the optimizer remembers of each weight."""
        p = self.sparsifier._parameters[name]
        found = [v for v in self.optimizer.state[p].values() if torch.is_tensor(v) and v.shape == p.shape]
        module = self.model.get_submodule(name.rpartition(".")[0])
        shape = stored.shape_of(module)
        return found if shape is None else [dense(v, module.positions, shape) for v in found]


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    ) and all(torch.equal(a.sparsifier.masks[n], b.sparsifier.masks[n]) for n in a.sparsifier.masks)


@both
@trained
def test_inactive_weights_and_buffers_are_zero_after_every_step(variant, optimizer):
    run = Run(variant, optimizer)
    for _ in range(STEPS):
        run.step()
        run.sparsifier.refresh()
        for name, mask in run.sparsifier.masks.items():
            assert not run.weight(name)[~mask].any()
            assert run.buffers(name)
            assert not any(buffer[~run.live(name)].any() for buffer in run.buffers(name))


@trained
def test_the_active_count_is_the_budget_of_the_schedule_at_every_update(variant):
    """Counted in what the pattern has come and go as a whole; and every mask that can be legal is."""
    run = Run(variant)
    method, sparsifier, pattern = run.sparsifier.method, run.sparsifier, run.sparsifier.pattern
    shapes = {name: pattern.shape(tuple(mask.shape)) for name, mask in sparsifier.masks.items()}
    total, legal = sum(map(prod, shapes.values())), sum(map(granet.distribution.capacity, shapes.values()))

    def check(step):
        if method.sparsity_at(step) is None:  # an outcome
            sparsifier.refresh()
            assert all(torch.equal(mask, run.weight(name) != 0) for name, mask in sparsifier.masks.items())
            return
        wanted = granet.distribution.budget(total, 1 - method.sparsity_at(step))
        if isinstance(method, granet.SRigL):  # the largest constant fan-ins within the budget
            masks = {name: pattern.pooled_mask(mask) for name, mask in sparsifier.masks.items()}
            fan_ins = [granet.topology.row_counts(mask) for mask in masks.values()]
            assert all(set(n.tolist()) <= {0, int(n.max())} for n in fan_ins)
            assert wanted - sum(map(count, fan_ins)) < sparsifier.active_units <= wanted
        else:
            assert sparsifier.active_units == wanted
        assert wanted > legal or all(pattern.obeyed(mask) for mask in sparsifier.masks.values())

    check(0)
    for _ in range(STEPS):
        run.step()
        if method.is_update(sparsifier.step):
            check(sparsifier.step)
        assert sparsifier.active == sum(count(mask) for mask in sparsifier.masks.values())
        assert all(sparsifier.counts.values())
    if method.sparsity_at(STEPS) is None:
        return
    final = method.final_counts(shapes)
    if final is None:
        return
    assert sparsifier.active_units == (final if isinstance(final, int) else sum(final.values()))
    if not isinstance(method, granet.SRigL):
        assert sparsifier.active_units == granet.distribution.budget(total, 1 - getattr(method, "sparsity", 0.0))
    if not isinstance(final, int):
        assert {name: count(pattern.pooled_mask(mask)) for name, mask in sparsifier.masks.items()} == final
    assert all(pattern.obeyed(mask) for mask in sparsifier.masks.values())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.split()[0] not in KEPT])
def test_the_topology_changes_where_the_method_says_and_nowhere_else(variant):
    run = Run(variant)
    changes = []
    for _ in range(STEPS):
        before = dict(run.sparsifier.masks)
        run.step()
        if any(not torch.equal(before[name], mask) for name, mask in run.sparsifier.masks.items()):
            changes.append(run.sparsifier.step)
    # an update may change nothing (gradual pruning before it begins); a change without an update is a defect
    assert changes
    assert all(run.sparsifier.method.is_update(step) for step in changes)
    assert run.sparsifier.version == len(changes)


@both
@trained
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(variant, optimizer):
    whole = Run(variant, optimizer)
    for at in range(STEPS):
        if at == 10:  # between two updates
            state = whole.state()
        whole.step()
    resumed = Run(variant, optimizer, seed=99)
    kept = copy.deepcopy(state)
    resumed.model.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    for _ in range(2):  # loading twice changes nothing, neither here nor in the state
        resumed.sparsifier.load_state_dict(state[2])
    assert all(torch.equal(kept[2]["masks"][n], state[2]["masks"][n]) for n in kept[2]["masks"])
    for _ in range(10, STEPS):
        resumed.step()
    assert same(whole, resumed)
    assert resumed.sparsifier.exploration == whole.sparsifier.exploration
    assert resumed.sparsifier.version == whole.sparsifier.version


@pytest.mark.parametrize(
    ("variant", "part"),
    [
        ("rigl accumulate", "gradients"),
        ("granet momentum", "gradients"),
        ("snfs", "gradients"),
        ("dsr", "memory"),
        ("deep-r", "memory"),
    ],
)
def test_what_is_kept_between_two_updates_is_in_the_state(variant, part):
    """And it matters: without it the run goes on differently."""
    whole, resumed, poorer = Run(variant), Run(variant, seed=99), Run(variant, seed=99)
    for _ in range(10):
        whole.step()
    for run in (resumed, poorer):
        state = whole.state()
        assert state[2][part]
        run.model.load_state_dict(state[0])
        run.optimizer.load_state_dict(state[1])
        run.sparsifier.load_state_dict(state[2] | {part: {}} if run is poorer else state[2])
    for _ in range(10, STEPS):
        for run in (whole, resumed, poorer):
            run.step()
    assert same(whole, resumed) and not same(whole, poorer)
    for kept in ("gradients", "memory"):
        a, b = (run.sparsifier.state_dict()[kept] for run in (whole, resumed))
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@trained
def test_the_state_dict_is_that_of_the_dense_model(variant):
    """Where weights are masked in place at any time; else as `plain_state_dict`, and when it is folded."""
    run, plain = Run(variant).step(), network()
    state = run.sparsifier.plain_state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    x, _ = batch(0)
    copies = [plain, run.model, pickle.loads(pickle.dumps(copy.deepcopy(run.model)))]
    before = [one.eval()(x) for one in copies]
    run.sparsifier.fold()
    run.sparsifier.fold()
    same = torch.allclose if variant in STORED else torch.equal  # layers in sparse storage add up in another order
    assert all(same(y, run.model(x)) for y in before)
    assert list(run.model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in run.model.state_dict().items())
    if not run.sparsifier.method.reparameterizes:
        assert list(copies[-1].state_dict()) == list(state)


@every
def test_a_nan_gradient_at_an_inactive_place_does_not_spread(variant):
    def spoil(run):
        for name, p in run.model.named_parameters():
            if name in run.sparsifier.masks:
                p.grad[~run.live(name)] = float("nan")

    run, clean = Run(variant), Run(variant)
    for _ in range(3):  # no update among the first three steps
        run.step(spoil)
        clean.step()
    assert same(run, clean)


@every
def test_accumulated_gradients_give_the_masks_of_the_whole_batch(variant):
    def train(pieces):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4)).double()
        probe = Probe(model, [(torch.ones(2, 24).double(), torch.ones(2, 4).double())], nn.functional.mse_loss)
        sparsifier = Sparsifier(model, make(variant), probe=probe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier.attach(optimizer)
        for step in range(STEPS):
            rng = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 24, generator=rng).double(), torch.randn(8, 4, generator=rng).double()
            for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (nn.functional.mse_loss(model(a), b) / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
        return sparsifier

    one, four = train(1), train(4)
    assert one.step == four.step == STEPS
    assert all(torch.equal(one.masks[name], four.masks[name]) for name in one.masks)


def test_a_method_that_replaces_the_step_leaves_weights_and_biases_where_they_were():
    run = Run("rigl")
    for _ in range(STEPS):
        before = copy.deepcopy(run.model.state_dict())
        masks = dict(run.sparsifier.masks)
        run.step()
        if run.sparsifier.method.is_update(run.sparsifier.step):
            assert torch.equal(run.model[4].bias, before["4.bias"])
            stayed = masks["4.weight"] & run.sparsifier.masks["4.weight"]
            assert torch.equal(run.model[4].weight[stayed], before["4.weight"][stayed])
        else:
            assert not torch.equal(run.model[4].bias, before["4.bias"])
