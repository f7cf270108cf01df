"""SRigL: which neurons are ablated, and what is left of a network without them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import granet
from granet import Sparsifier, SRigL
from granet.criterion import Layer
from granet.topology import count, row_counts

METHOD = SRigL(sparsity=0.5, end=100, interval=10, drop_fraction=0.5, min_salient=0.5, distribution="uniform")


def updated(weight, grad, method=METHOD):
    """The mask after an update at step 50, where a quarter of the weights are exchanged, of a layer before the last."""
    layers = {"a": Layer(torch.tensor(weight), torch.tensor(grad)), "last": Layer(torch.ones(2, 2), torch.ones(2, 2))}
    masks = {name: layer.weight != 0 for name, layer in layers.items()}
    masks["last"] = torch.eye(2).bool()
    return method.update(50, layers, masks, torch.Generator())["a"].int().tolist()


def test_an_update_a_reader_can_follow():
    """Four neurons with two of four weights each; of eight weights the two smallest, 0.2 and 0.1, make room.

    RigL would have 2, 3, 2 and 1 weights in them. Each needs one, half of its fan-in, so that none is ablated.
    """
    weight = [[0.9, 0.8, 0, 0], [0, 0.7, 0.6, 0], [0.5, 0.4, 0, 0], [0.2, 0.1, 0, 0]]
    grad = [[0.0, 0, 0.3, 0.1], [0.8, 0, 0, 0], [0, 0, 0.1, 0], [0.4, 0.2, 0.9, 0.1]]
    assert updated(weight, grad) == [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]]


def test_a_neuron_without_salient_weights_is_ablated_and_the_others_share_its_weights():
    """As above, but the steepest gradients are elsewhere: eight weights for three neurons are two each."""
    weight = [[0.9, 0.8, 0, 0], [0, 0.7, 0.6, 0], [0.5, 0.4, 0, 0], [0.2, 0.1, 0, 0]]
    grad = [[0.0, 0, 0.7, 0.1], [0.8, 0, 0, 0], [0, 0, 0.1, 0], [0.4, 0.2, 0.5, 0.1]]
    assert updated(weight, grad) == [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_without_ablation_every_neuron_keeps_its_fan_in():
    """Two neurons have all salient weights: they get four each with ablation, and all get two without it."""
    weight = [[0.9, 0.8, 0, 0], [0, 0.7, 0.6, 0], [0.1, 0.1, 0, 0], [0.2, 0.1, 0, 0]]
    grad = [[0.0, 0, 0.7, 0.6], [0.8, 0, 0, 0.5], [0, 0, 0.2, 0.1], [0.3, 0.2, 0.4, 0.1]]
    assert updated(weight, grad, replace(METHOD, drop_fraction=1.0)) == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]
    without = replace(METHOD, drop_fraction=1.0, min_salient=0.0)
    assert updated(weight, grad, without) == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0]]


def test_an_ablated_neuron_comes_back_when_its_gradients_are_salient():
    weight = [[0.9, 0.8, 0, 0], [0, 0.7, 0.6, 0], [0.5, 0.4, 0, 0], [0, 0, 0, 0]]
    grad = [[0.0, 0, 0.1, 0.1], [0, 0, 0, 0], [0, 0, 0.1, 0], [0.4, 0.2, 0.5, 0.1]]
    assert updated(weight, grad)[3] == [1, 0, 1, 0]


def test_neurons_stay_for_the_whole_budget_and_the_last_layer_keeps_all():
    """One neuron alone is salient, and two are needed for eight weights; of three that are alike the first stays."""
    weight = [[0.9, 0.8, 0.7, 0.6], [0.5, 0, 0, 0], [0.5, 0, 0, 0], [0.5, 0.5, 0, 0]]
    layer = Layer(torch.tensor(weight), torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    mask = layer.weight != 0
    method = SRigL(sparsity=0.5, end=100, interval=10, min_salient=1.0, drop_fraction=0.0, distribution="uniform")
    after = method.update(50, {"a": layer, "last": layer}, {"a": mask, "last": mask}, torch.Generator())
    assert row_counts(after["a"]).tolist() == [4, 0, 0, 4]
    assert row_counts(after["last"]).tolist() == [2, 2, 2, 2]


def trained(model, method, x, y, steps=60):
    sparsifier = Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for step in range(steps):
        part = slice(step * 32 % len(x), step * 32 % len(x) + 32)
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


@pytest.mark.parametrize("min_salient", [0.0, 0.9])
def test_shrink_cuts_ablated_neurons_out_and_the_network_computes_the_same(min_salient):
    from sklearn.datasets import load_digits

    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = (x / 16).double()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(576, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 10),
    ).double()  # fmt: skip
    method = SRigL(sparsity=0.9, end=60, interval=5, min_salient=min_salient)
    sparsifier = trained(model, method, x, y)
    fan_ins = {name: row_counts(mask) for name, mask in sparsifier.masks.items()}
    alive = {name: count(n > 0) for name, n in fan_ins.items()}
    assert all(set(n.tolist()) <= {0, int(n.max())} for n in fan_ins.values())
    assert (alive["5.weight"] < 60) == (min_salient > 0) and alive["9.weight"] == 10
    small = granet.shrink(model.eval(), x[:64])
    torch.testing.assert_close(small.model(x), model(x), rtol=1e-9, atol=1e-9)
    left = {layer.name: layer.after[0] for layer in small.layers}
    assert left["5.weight"] <= alive["5.weight"] and left["7.weight"] <= alive["7.weight"]
    # what is left has the same constant fan-in, but for inputs that were constant or nobody made
    assert {int(n) for n in row_counts(small.model[9].weight != 0)} <= set(range(int(fan_ins["9.weight"].max()) + 1))


def test_a_fan_in_of_less_than_one_is_refused_at_once():
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    with pytest.raises(ValueError, match=r"less than one for each of the 300 neurons of '0.weight'"):
        Sparsifier(model, SRigL(sparsity=0.99, end=10))
    with pytest.raises(ValueError, match="obeys a pattern"):
        Sparsifier(model, SRigL(sparsity=0.5, end=10), pattern="2:4", skip="2")
    with pytest.raises(ValueError, match="has one dimension"):
        Sparsifier(model, SRigL(sparsity=0.5, end=10), pattern="channel")
