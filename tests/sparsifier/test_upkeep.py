"""Resuming in any order, parameters that are replaced or moved, frozen layers: nothing is lost without a word."""

import copy
import itertools

import pytest
import torch
from small_training import nonzero_inactive, three_layers, train_steps
from torch import nn
from torch.nn import functional as F

import granet
from granet import GMP, RigL, Sparsifier, Static
from granet.sparsifier.reparameterize import is_reparameterized

METHODS = {
    "rigl": RigL(sparsity=0.9, end=100, interval=5),
    "granet": granet.GraNet(sparsity=0.9, initial_sparsity=0.5, end=60, total=100, interval=5),
    "top-kast": granet.TopKAST(sparsity=0.8),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


def step(model, optimizer, seed=0):
    rng = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 20, generator=rng)), torch.arange(16) % 5).backward()
    optimizer.step()


def dirt(sparsifier):
    weights = dict(sparsifier.model.named_parameters())
    return sum(int((weights[name][~mask] != 0).sum()) for name, mask in sparsifier.masks.items())


@pytest.fixture(scope="module")
def saved():
    """For each method what three states were after 50 steps, and the weights after 10 more."""
    states = {}
    for key, method in METHODS.items():
        model = mlp()
        sparsifier = Sparsifier(model, method)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        sparsifier.attach(optimizer)
        for i in range(50):
            step(model, optimizer, i)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
        for i in range(50, 60):
            step(model, optimizer, i)
        states[key] = state, model.state_dict()
    return states


PARTS = ("make", "attach", "model", "optimizer", "sparsifier")
ORDERS = [
    order
    for order in itertools.permutations(PARTS)
    if order.index("make") < min(order.index("attach"), order.index("sparsifier"))
]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_resumed_in_any_order(method, order, saved):
    """`make` and `attach` the sparsifier, load the states of model, optimizer and sparsifier: 40 orders."""
    (model_state, optimizer_state, sparsifier_state), after = copy.deepcopy(saved[method])
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    average = copy.deepcopy(model)
    for part in order:
        if part == "make":
            sparsifier = Sparsifier(model, METHODS[method], seed=3)
            if not is_reparameterized(model):
                average.load_state_dict(model_state)
                sparsifier.follow(average)
        elif part == "attach":
            sparsifier.attach(optimizer)
        elif part == "model":
            model.load_state_dict(model_state)
        elif part == "optimizer":
            optimizer.load_state_dict(optimizer_state)
        else:
            sparsifier.load_state_dict(sparsifier_state)
    for i in range(50, 60):
        step(model, optimizer, i)
        if i == 50 and not is_reparameterized(model):  # the average has lost nothing either
            assert all(torch.equal(value, model_state[name]) for name, value in average.state_dict().items())
    assert sparsifier.step == 60
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_weights_that_are_loaded_without_their_masks_are_not_lost_in_silence(saved):
    model = mlp()
    sparsifier = Sparsifier(model, METHODS["rigl"], seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier.attach(optimizer)
    model.load_state_dict(saved["rigl"][0][0])
    with pytest.warns(RuntimeWarning, match=r"\d+ weights that the masks call inactive.*load_state_dict"):
        step(model, optimizer)
    assert dirt(sparsifier) == 0


def test_what_is_kept_aside_before_the_first_step_is_let_go_there():
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    assert sparsifier._aside._taken
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    step(model, optimizer)
    assert sparsifier._aside is None


@pytest.mark.parametrize("how", ["head", "assign"])
def test_parameters_that_were_replaced_are_refused_at_the_next_step(how):
    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    step(model, optimizer)
    if how == "head":
        model[2] = nn.Linear(40, 50)
        optimizer.add_param_group({"params": model[2].parameters()})
    else:
        model.load_state_dict(
            {name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True
        )
    with pytest.raises(RuntimeError, match=r"is no longer the parameter.*assign=True.*make a new Sparsifier"):
        step(model, optimizer)
    with pytest.raises(RuntimeError, match="is no longer the parameter"):
        sparsifier.report()
    with pytest.raises(RuntimeError, match="is no longer the parameter"):
        sparsifier.state_dict()


def test_a_replaced_parameter_is_found_in_a_model_of_many_layers():
    """Some are looked at after each step: all within so many steps as there are layers."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(30)))
    sparsifier = Sparsifier(model, Static(sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    model[29] = nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match=r"'29.weight' is no longer"):
        for _ in range(5):
            optimizer.step()


def test_a_parameter_that_only_got_another_name_is_still_kept_sparse():
    """Wrappers of adapters put the layer that they adapt one level deeper."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(20, 40)

        def forward(self, x):
            return self.base(x) + self.more(x)

    model = mlp()
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    model[0] = Adapted(model[0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    for i in range(3):
        step(model, optimizer, i)
    assert not model[0].base.weight[~sparsifier.masks["0.weight"]].any()


def test_a_model_that_changes_its_floating_point_type_after_attach_goes_on():
    model = mlp()
    sparsifier = Sparsifier(model, RigL(sparsity=0.9, end=100, interval=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    step(model, optimizer)
    model.double()
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 20).double()).square().mean().backward()
        optimizer.step()
        assert dirt(sparsifier) == 0
    assert sparsifier.step == 5


def test_a_frozen_layer_is_left_dense_and_the_plan_says_so():
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    model[0].requires_grad_(False)
    method = GMP(sparsity=0.9, end=40, interval=5)
    rows = {row.name: row for row in granet.plan(model, method).rows}
    assert not rows["0.weight"].sparse and rows["0.weight"].reason.startswith("frozen")
    sparsifier = Sparsifier(model, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    sparsifier.attach(optimizer)
    for i in range(60):
        step(model, optimizer, i)
    assert set(sparsifier.counts) == {"2.weight", "4.weight"} and model[0].weight.all()
    assert sparsifier.active == granet.distribution.budget(40 * 40 + 40 * 5, 0.1)


@pytest.mark.parametrize("only", ["0.weight", "linear", "0*", nn.Linear])
def test_a_frozen_layer_that_is_asked_for_is_sparse(only):
    model = mlp()
    model[0].requires_grad_(False)
    row = granet.plan(model, Static(sparsity=0.9), only=only).rows[0]
    assert row.sparse and row.reason.endswith("frozen")


def test_a_model_that_is_not_trained_at_all_is_sparse_as_ever():
    model = mlp().requires_grad_(False)
    assert len(Sparsifier(model, Static(sparsity=0.9)).masks) == 2


def test_a_layer_that_is_frozen_in_the_middle_and_pruned_is_named():
    model = mlp()
    sparsifier = Sparsifier(model, GMP(sparsity=0.9, end=10, interval=5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)
    for i in range(4):
        step(model, optimizer, i)
    model[0].requires_grad_(False)
    with pytest.warns(RuntimeWarning, match="'0.weight' is frozen.*was pruned at step 5.*skip="):
        step(model, optimizer, 4)


def test_the_device_that_torch_makes_tensors_on_does_not_matter():
    """The meta device stands for a GPU: a tensor made there by mistake cannot be computed with."""
    for method in (
        Static(sparsity=0.9),
        RigL(sparsity=0.9, end=20, interval=2),
        granet.SET(sparsity=0.9, total=20, interval=2),
    ):
        model = mlp()
        torch.set_default_device("meta")
        try:
            sparsifier = Sparsifier(model, method)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            sparsifier.attach(optimizer)
            for _ in range(6):
                optimizer.zero_grad()
                model(torch.ones(4, 20, device="cpu")).square().sum().backward()
                optimizer.step()
            sparsifier.load_state_dict(sparsifier.state_dict())
            assert "total" in str(sparsifier.report())
        finally:
            torch.set_default_device(None)
        assert sparsifier.step == 6 and dirt(sparsifier) == 0


def test_every_piece_of_a_large_weight_is_looked_at_within_some_steps(monkeypatch):
    from granet.sparsifier import masking

    monkeypatch.setattr(masking.Watch, "SIZES", (64, 64))
    model = nn.Linear(64, 64)
    sparsifier = Sparsifier(model, Static(sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier.attach(optimizer)

    def once():
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        once()
    assert sparsifier._attached.kept is True
    place = tuple((~sparsifier.masks["weight"]).nonzero()[-1])
    with torch.no_grad():
        model.weight[place] = 1.0
    with pytest.warns(RuntimeWarning, match="were no longer zero"):
        for _ in range(32):
            once()
    assert dirt(sparsifier) == 0


def test_dense_weights_that_are_loaded_are_cleared_at_the_next_step():
    model = three_layers()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    sparsifier = Sparsifier(model, Static(sparsity=0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 10)
    model.load_state_dict(dense)
    with pytest.warns(RuntimeWarning, match="at step 11 inactive weights.*If dense weights were loaded"):
        train_steps(model, optimizer, 1)
    assert nonzero_inactive(sparsifier, optimizer) == 0
    train_steps(model, optimizer, 100)
    assert sparsifier._attached.kept is True  # the optimizer was not to blame
