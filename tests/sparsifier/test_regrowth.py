"""What optimizers remember of a weight that has just become active, and how far it moves at first."""

import math

import pytest
import torch
from small_training import three_layers, train_steps
from torch import nn

import granet
from granet import RigL, Sparsifier
from granet.sparsifier import quantised, regrowth, stepping
from granet.sparsifier.regrowth import Start
from granet.topology import count


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of a mean of gradients."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                if p.grad is not None:
                    p.sub_((mean * 0.9 + p.grad * 0.1).sign(), alpha=group["lr"])
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Lion": lambda p: Lion(p, lr=3e-4),
}
METHODS = {
    "SET": lambda: granet.SET(sparsity=0.8, interval=50, total=400),
    "RigL": lambda: granet.RigL(sparsity=0.8, interval=50, end=400),
}


def train(method, make, steps):
    """A network, its sparsifier and its optimizer after so many steps on random batches of a fixed task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    sparsifier = granet.Sparsifier(model, method())
    optimizer = make(model.parameters())
    sparsifier.attach(optimizer)
    task = torch.randn(20, 5)
    for _ in range(steps):
        step(model, optimizer, task)
    return model, sparsifier, optimizer, task


def step(model, optimizer, task):
    x = torch.randn(64, 20)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), (x @ task).argmax(1)).backward()
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_move_of_a_grown_weight_is_at_most_one_learning_rate(method, optimizer):
    """In the median; and the far ones among them move no farther than the far ones that were there before."""
    model, sparsifier, optimizer, task = train(METHODS[method], OPTIMIZERS[optimizer], 199)
    old = dict(sparsifier.masks)
    step(model, optimizer, task)
    weights = {name: p for name, p in model.named_parameters() if name in old}
    before = {name: p.detach().clone() for name, p in weights.items()}
    step(model, optimizer, task)
    moved = {name: (p.detach() - before[name]).abs() / optimizer.param_groups[0]["lr"] for name, p in weights.items()}
    grown = torch.cat([moved[name][sparsifier.masks[name] & ~old[name]] for name in old])
    others = torch.cat([moved[name][sparsifier.masks[name] & old[name]] for name in old])
    assert len(grown) > 10 and grown.any()
    assert grown.median() <= 1.001
    assert grown.quantile(0.9) <= max(1.001, others.quantile(0.9))


def test_every_buffer_of_torch_is_in_the_table():
    """A new one should not go by the rule for unknown optimizers unnoticed."""
    for make in OPTIMIZERS.values():
        p = nn.Parameter(torch.ones(3, 2))
        p.grad = torch.ones(3, 2)
        optimizer = make([p])
        optimizer.step()
        held = {key for key, value in optimizer.state[p].items() if torch.is_tensor(value) and value.shape == p.shape}
        assert held <= set(regrowth.STARTS)


OLD = torch.tensor([[True, True, False], [True, True, False]])
NEW = torch.tensor([[True, True, True], [False, True, True]])
GRAD = torch.tensor([[1.0, -1.0, 8.0], [1.0, 1.0, -0.5]])


def warmed(key, optimizer=None, grad=GRAD, values=((1.0, 2.0, 0.0), (5.0, 4.0, 0.0))):
    """A buffer of that name, with a mean of 3 over the weights that were active, after two weights were grown."""
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.25)))([p])
    buffer = optimizer.state[p][key] = torch.tensor(values)
    before = buffer.clone()
    regrowth.warm([optimizer], {"p": p}, {"p": OLD}, {"p": NEW}, {} if grad is None else {"p": grad})
    assert torch.equal(buffer[OLD], before[OLD])  # what is dropped is for others to clear
    return buffer[NEW & ~OLD].tolist()


@pytest.mark.parametrize("key", [key for key, start in regrowth.STARTS.items() if start is Start.ZERO])
def test_directions_start_from_zero(key):
    assert warmed(key) == [0.0, 0.0]


@pytest.mark.parametrize("key", [key for key, start in regrowth.STARTS.items() if start is Start.SQUARE])
def test_squares_of_gradients_start_from_the_layers_mean_or_the_gradients_share(key):
    """Gradients of active weights are 1 here, those of the grown ones 8 and 0.5."""
    assert warmed(key) == [3.0 * 64, 3.0]
    assert warmed(key, grad=None) == [3.0, 3.0]


def test_a_first_moment_that_takes_a_tenth_of_a_gradient_is_divided_by_a_tenth():
    adam = lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.75, 0.99))  # noqa: E731  (one line)
    assert warmed("exp_avg_sq", adam) == [3.0 * 64 / 16, 3.0 / 16]
    assert warmed("exp_inf", lambda p: torch.optim.Adamax(p, betas=(0.75, 0.99))) == [3.0 * 8 / 4, 3.0 / 4]
    assert warmed("exp_avg_sq", torch.optim.NAdam) == [3.0 * 64, 3.0]  # it looks ahead


def test_sizes_of_steps_are_the_layers_mean_or_the_learning_rate():
    assert warmed("acc_delta") == [3.0, 3.0]
    assert warmed("step_size") == [0.25, 0.25]


def test_gradients_that_say_nothing_are_left_out():
    for useless in (torch.zeros(2, 3), torch.full((2, 3), float("nan"))):
        assert warmed("exp_avg_sq", grad=useless) == [3.0, 3.0]


def test_an_unknown_buffer_gets_the_mean_if_it_is_nowhere_negative():
    assert warmed("size_of_something") == [3.0, 3.0]
    assert warmed("direction", values=((1.0, -2.0, 0.0), (5.0, 4.0, 0.0))) == [0.0, 0.0]


def test_an_unknown_direction_that_is_positive_in_one_layer_starts_from_zero():
    p, q = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1)
    optimizer.state[p]["direction"] = OLD.float()
    optimizer.state[q]["direction"] = torch.tensor([1.0, -1.0])
    regrowth.warm([optimizer], {"p": p}, {"p": OLD}, {"p": NEW}, {})
    assert torch.equal(optimizer.state[p]["direction"], OLD.float())


@pytest.mark.parametrize("kind", ["AdamW", "Rprop"])
def test_weights_that_were_there_before_keep_their_state_to_the_bit(kind):
    """RigL's optimizer does not step at an update. What is dropped and grown again in one was there before."""
    model, sparsifier, optimizer, task = train(
        lambda: granet.RigL(sparsity=0.5, interval=20, end=400, drop_fraction=0.9), OPTIMIZERS[kind], 19
    )
    old = dict(sparsifier.masks)
    weights = {name: p for name, p in model.named_parameters() if name in old}
    before = {name: [b.clone() for b in stepping.buffers([optimizer], p)] for name, p in weights.items()}
    step(model, optimizer, task)
    assert sum(sparsifier.last_update.grown.values())
    for name, p in weights.items():
        stayed = old[name] & sparsifier.masks[name]
        for was, now in zip(before[name], stepping.buffers([optimizer], p), strict=True):
            assert torch.equal(was[stayed], now[stayed])
            assert not now[~sparsifier.masks[name]].any()


def test_each_of_several_optimizers_is_asked_for_its_own_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    sparsifier = granet.Sparsifier(model, granet.RigL(sparsity=0.8, interval=10, end=100))
    first = torch.optim.Adagrad(model[0].parameters(), lr=0.1, initial_accumulator_value=0.5)
    second = torch.optim.Rprop(model[2].parameters(), lr=0.125)
    sparsifier.attach(first, second)
    for _ in range(10):
        old = dict(sparsifier.masks)
        nn.functional.cross_entropy(model(torch.randn(64, 20)), torch.randint(0, 5, (64,))).backward()
        first.step()
        second.step()
    grown = {name: sparsifier.masks[name] & ~old[name] for name in old}
    assert all(mask.any() for mask in grown.values())
    assert (first.state[model[0].weight]["sum"][grown["0.weight"]] >= 0.5).all()
    assert (second.state[model[2].weight]["step_size"][grown["2.weight"]] == 0.125).all()


def test_factored_and_scalar_state_stays_as_it_is():
    _, sparsifier, optimizer, _ = train(METHODS["RigL"], lambda p: torch.optim.Adafactor(p, lr=0.01), 50)
    assert sparsifier.version == 1
    assert all(math.isfinite(float(state["row_var"].sum())) for state in optimizer.state.values() if "row_var" in state)


def codes(scales, values):
    """Numbers in the format of bitsandbytes: two blocks of four."""
    table = torch.linspace(0, 1, 256)
    held = quantised.Codes(torch.zeros(2, 4, dtype=torch.uint8), 0, table, torch.tensor(scales))
    quantised.put(held, torch.tensor(values))
    return held


def test_codes_take_new_numbers_and_keep_the_others():
    held = codes([1.0, 2.0], [[0.1, 0.2, 0.0, 1.0], [0.4, 2.0, 0.0, 0.0]])
    before = quantised.numbers(held).clone()
    torch.testing.assert_close(before, torch.tensor([[0.1, 0.2, 0.0, 1.0], [0.4, 2.0, 0.0, 0.0]]), atol=4e-3, rtol=0)
    wanted = before.clone()
    wanted[0, 2] = 0.5
    quantised.put(held, wanted)
    assert torch.equal(quantised.numbers(held)[before != 0], before[before != 0])
    assert quantised.numbers(held)[0, 2] == pytest.approx(0.5, abs=2e-3)
    wanted[1, 2] = 8.0  # larger than all of its block
    quantised.put(held, wanted)
    torch.testing.assert_close(quantised.numbers(held), wanted, atol=0.02, rtol=0)


def test_codes_without_scales_are_left_alone():
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    state = torch.arange(6, dtype=torch.uint8).view(2, 3)
    optimizer.state[p] = {"state2": state, "qmap2": torch.linspace(0, 1, 256)}
    regrowth.warm([optimizer], {"p": p}, {"p": OLD}, {"p": NEW}, {})
    assert state.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_regrown_weight_starts_from_zero_with_moments_of_its_layers_size():
    model = three_layers()
    sparsifier = Sparsifier(model, RigL(sparsity=0.7, end=100, interval=5))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    sparsifier.attach(optimizer)
    train_steps(model, optimizer, 4)
    before = dict(sparsifier.masks)
    train_steps(model, optimizer, 1)
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
