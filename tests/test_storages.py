"""Which layers and methods can train in sparse storage, and what is said of the others."""

import pytest
from torch import nn

import granet
from granet.sparsifier.sparse_storage import is_stored
from granet.storages import LAYERS, STORAGES


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (granet.STR(s_init=-3.0, interval=4), "needs all weights"),
        (granet.DeepR(sparsity=0.8), "needs all weights"),
        (granet.GMP(sparsity=0.9, end=10), "starts dense"),
        (granet.GraNet(sparsity=0.9, initial_sparsity=0.0, end=10, total=20), "starts dense"),
        (granet.RigL(sparsity=0.8, end=9, growth="momentum"), "averages the dense gradients"),
        (granet.RigL(sparsity=0.8, end=9, accumulate=4), "averages the dense gradients"),
        (granet.SNFS(sparsity=0.8, total=9), "averages the dense gradients"),
    ],
)
def test_methods_that_need_dense_weights_are_refused(method, message):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    with pytest.raises(ValueError, match=rf'{type(method).__name__}.*{message}.*storage="dense"'):
        granet.Sparsifier(model, method, storage="sparse")
    assert not is_stored(model)
    with pytest.raises(ValueError, match=message):
        granet.plan(model, method, storage="sparse")


def test_an_unknown_storage_and_a_model_without_layers_for_it_are_refused():
    method = granet.RigL(sparsity=0.8, end=24, interval=4)
    with pytest.raises(ValueError, match=r"storage 'spares'.*sparse"):
        granet.Sparsifier(nn.Linear(4, 4), method, storage="spares")
    with pytest.raises(ValueError, match="no layer can be in sparse storage"):
        granet.Sparsifier(nn.LSTM(8, 8), method, storage="sparse")
    assert STORAGES == ("dense", "sparse") and nn.Linear in LAYERS


def test_the_plan_says_which_layers_stay_in_dense_storage_and_why():
    model = nn.Sequential(nn.Linear(12, 12), nn.LSTM(12, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    method = granet.Static(sparsity=0.5)
    reasons = {row.name: row.reason for row in granet.plan(model, method, storage="sparse").rows}
    assert reasons["0.weight"] == "linear"
    assert "; in dense storage: sparse storage has linear and convolution layers" in reasons["1.weight_ih_l0"]
    assert reasons["2.weight"].endswith("; in dense storage: it is also '3.weight'")
    sparsifier = granet.Sparsifier(model, method, storage="sparse")
    stays = {name for name, reason in reasons.items() if "dense storage" in reason}
    assert set(sparsifier._stored.modules) == set(sparsifier.masks) - stays
    assert not any("dense storage" in row.reason for row in granet.plan(nn.Linear(4, 4), method).rows)
