import logging
import math

import pytest
import torch
from torch import nn

from granet.train.health import Health, first_dead_layer
from granet.train.recipe import validate
from granet.train.run import Run, execute
from granet.train.trainer import Trainer


def recipe(**train):
    train = {"epochs": 2, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu"} | train
    values = {"name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "train": train}
    return validate(values | {"method": {"name": "static", "sparsity": 0.9}}, source="test")


def warnings(caplog):
    found = [r.getMessage() for r in caplog.records if r.name == "granet.train.health"]
    caplog.clear()
    return found


def test_the_layer_that_loses_the_image_is_found():
    torch.manual_seed(0)
    images = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model.train()
    assert first_dead_layer(model, images) is None
    with torch.no_grad():
        model[0].bias.fill_(-100)  # the linear layer still tells images apart, and the ReLU behind it does not
    assert first_dead_layer(model, images) == "1"
    with torch.no_grad():
        model[0].weight.zero_()
    assert first_dead_layer(model, images) == "0"
    assert model.training and not model[0]._forward_hooks


def test_what_is_the_same_for_all_images_by_design_is_not_dead():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 5))

        def forward(self, x):
            return self.weight.expand(len(x), 5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.fold = Positions(), nn.Identity()

        def forward(self, x):
            return x + self.fold(self.positions(x[:1]).expand(len(x), 5))

    assert first_dead_layer(Net(), torch.randn(4, 5)) is None


def test_a_network_that_learns_is_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        execute(Run.for_recipe(recipe(), tmp_path))
    assert warnings(caplog) == []


def test_a_dead_network_is_warned_of_once(caplog):
    trainer = Trainer(recipe(epochs=3))
    with torch.no_grad():
        trainer.model[2].bias.fill_(-1e4)
    records = []
    with caplog.at_level(logging.WARNING):
        assert trainer.fit(record=records.append, save=lambda: None)
    assert sum(record["kind"] == "eval" for record in records) == 3
    chance, dead = sorted(warnings(caplog), key=lambda text: "dead" in text)
    assert "no better than guessing among 10 classes (2.303). Try a lower train.lr (now 0.05)" in chance
    assert "'3' is dead at step" in dead and "the network is at 90.0%" in dead


@pytest.mark.parametrize(
    ("step", "loss", "warns"), [(10, 2.4, False), (30, 2.4, True), (30, 2.0, False), (30, math.inf, True)]
)
def test_chance_counts_after_a_fifth_of_the_training(tmp_path, caplog, step, loss, warns):
    trainer = Trainer(recipe())
    trainer.steps, trainer.sparsifier.step = 100, step
    health = Health()
    with caplog.at_level(logging.WARNING):
        health.check(trainer, loss)
        health.check(trainer, loss)
    assert len(warnings(caplog)) == warns
