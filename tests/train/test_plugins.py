"""A package of one's own adds a method, a model, a dataset, an optimizer and a recipe, and granet is not edited."""

import json
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

import granet
from granet.train import data
from granet.train.catalog import DATASETS, MODELS, OPTIMIZERS

PLUGIN = '''
from dataclasses import dataclass
from pathlib import Path

import granet
from granet.methods.base import Steps


@granet.register("my-own")
@dataclass(frozen=True, kw_only=True)
class Mine(granet.Static):
    """Keeps a random topology, and makes sure of it now and then."""

    interval: Steps = 2

    def is_update(self, step):
        return step % self.interval == 0


@granet.register.model("two-layers")
def two_layers(classes, in_channels):
    """Two linear layers for 4x4 pixels."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, 20), nn.ReLU(), nn.Linear(20, classes))


@granet.register.dataset("bright", classes=2, shape=(1, 4, 4))
def bright(folder):
    """Images that are dark or bright."""
    import numpy

    labels = numpy.arange(100) % 2
    images = numpy.ones((100, 1, 4, 4)) * (50 + 100 * labels[:, None, None, None])
    return (images.astype("uint8"), labels), (images[:20].astype("uint8"), labels[:20])


@granet.register.optimizer("plain")
def plain(groups, settings):
    """SGD without momentum."""
    import torch

    return torch.optim.SGD(groups, lr=settings.lr)


granet.register.recipe(Path(__file__).parent / "brightness.yaml")
'''
RECIPE = """
summary: tells dark images from bright ones
data: {name: bright}
model: {name: two-layers}
method: {name: my-own, sparsity: 0.5, interval: 1ep}
train: {epochs: 2, batch_size: 10, optimizer: plain, lr: 0.1}
"""


@pytest.fixture(params=["entry point", "environment variable", "path"])
def command(request, tmp_path):
    """Runs a command line where the plugin is installed, or named by the environment variable; gives its output."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "mine.py").write_text(PLUGIN)
    (site / "brightness.yaml").write_text(RECIPE)
    named = {"environment variable": "mine", "path": "site/mine.py", "entry point": ""}[request.param]
    env = os.environ | {"GRANET_PLUGINS": named}
    env["PYTHONPATH"] = os.pathsep.join([*([str(site)] if request.param != "path" else []), *filter(None, sys.path)])
    if request.param == "entry point":
        information = site / "mine-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("[granet]\nanything = mine\n")

    def command(*words, code=0):
        words = [sys.executable, "-m", "granet.cli", *words]
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return command


def test_a_plugin_is_found(command):
    listed = command("ls", "methods")
    assert "my-own  " in listed and "Keeps a random topology" in listed


@pytest.mark.parametrize("command", ["entry point"], indirect=True)
def test_what_a_plugin_registers_is_trained(command, tmp_path):
    command("train", "brightness", "--train.epochs", "1")
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/brightness-my-own-*/summary.json"))
    assert (summary["method"], summary["model"], summary["data"]) == ("my-own", "two-layers", "bright")
    assert summary["sparsity"] == 0.5 and summary["steps"] == 9


@pytest.mark.parametrize("command", ["environment variable"], indirect=True)
def test_the_other_commands_see_it_too(command):
    assert "two-layers" in command("ls", "models")
    assert "interval: 3" in command("show", "digits", "--method", "my-own", "--method.interval", "3")
    assert "did you mean 'my-own'?" in command("train", "digits", "--method", "my-ovn", code=2)
    assert "linear layer" not in command("plan", "brightness")
    assert '"my-own"' in command("show", "--schema")


def images(n=20, shape=(1, 4, 4)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape)).astype("uint8")


def dataset(read, **more):
    granet.register.dataset("mine", **{"classes": 2, "shape": (1, 4, 4)} | more)(read)
    return data.load("mine", validation=0.1)


def test_mean_and_deviation_of_a_dataset_are_computed():
    x, y = images(), np.arange(20) % 2
    found = dataset(lambda folder: ((x, y), (x[:4], y[:4])))
    assert found.mean == pytest.approx([x.mean() / 255]) and found.std == pytest.approx([x.std() / 255])
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 4)
    assert dataset(lambda folder: ((x, y), (x, y)), mean=(0.5,), std=(0.1,)).std == (0.1,)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (
            images() / 255,
            np.arange(20) % 2,
            r"training set of mine must have uint8 images of shape \(n, 1, 4, 4\)",
        ),
        (images(shape=(4, 4)), np.arange(20) % 2, r"not uint8 of shape \(20, 4, 4\)"),
        (images(), np.arange(19) % 2, "one whole number as label for each of its 20 images"),
        (images(), np.arange(20) / 2, "one whole number"),
        (images(), np.arange(20), "labels from 0 to 1"),
    ],
)
def test_images_and_labels_of_a_dataset_are_checked(x, y, says):
    with pytest.raises(ValueError, match=says):
        dataset(lambda folder: ((x, y), (x, y)))


def test_a_dataset_that_is_not_there_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r"mine is not on this machine\. Copy it to .*/data"):
        dataset(lambda folder: None, find=lambda root: None, advice="Copy it to {root}.")


def test_only_classes_and_names_register_a_method():
    with pytest.raises(TypeError, match="decorates a class or takes a name, not 3"):
        granet.register(3)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe file"):
        granet.register.recipe(tmp_path / "mine.yaml")


def test_every_builtin_model_and_dataset_has_its_function():
    kinds = [entry.build for entry in (*MODELS.values(), *OPTIMIZERS.values())]
    for imported in [*kinds, *(source.read for source in DATASETS.values())]:
        module, _, name = imported.where.partition(":")
        assert callable(getattr(import_module(module), name))
