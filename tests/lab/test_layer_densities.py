"""From sensitivities to a recipe with densities by layer."""

import pytest
import yaml

from granet.cli import main
from granet.lab.layer_densities import densities
from granet.lab.sensitivity import Point, Sensitivity
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute
from granet.train.trainer import Trainer


def measured(**curves):
    """A sensitivity in which each layer has 1000 weights and these losses at sparsities 0.5, 0.9 and 0.99."""
    points = tuple(
        Point(name, sparsity, round(1000 * (1 - sparsity)), 1000, 0.9 - loss)
        for name, losses in curves.items()
        for sparsity, loss in zip((0.5, 0.9, 0.99), losses, strict=True)
    )
    return Sensitivity("x", "validation", 0.9, points, 0, dict.fromkeys(curves, 1.0))


def test_layers_lose_equally_much():
    found = densities(measured(tough=(0.0, 0.01, 0.02), frail=(0.1, 0.4, 0.8)), 0.7)
    assert sum(found.values()) / 2 == pytest.approx(0.3, abs=1e-6)
    assert found["tough"] == pytest.approx(0.01, abs=1e-6)  # it loses 0.02 there, where the other loses more
    assert found["frail"] == pytest.approx(0.59, abs=1e-6)


def test_equal_curves_give_equal_densities():
    found = densities(measured(a=(0.1, 0.2, 0.3), b=(0.1, 0.2, 0.3)), 0.9)
    assert found["a"] == pytest.approx(found["b"]) == pytest.approx(0.1, abs=1e-6)


def test_where_nothing_is_lost_layers_are_as_sparse_as_was_measured():
    assert densities(measured(a=(0.0, 0.0, 0.0), b=(-0.1, 0.0, -0.2)), 0.5) == {"a": 0.01, "b": 0.01}


def test_what_is_beyond_the_measurements_is_refused():
    with pytest.raises(ValueError, match=r"0\.995 is beyond what was measured.*0\.990"):
        densities(measured(a=(0.1, 0.2, 0.3)), 0.995)
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        densities(measured(a=(0.1, 0.2, 0.3)), 1.0)


def test_the_recipe_that_is_written_trains_with_these_densities(tmp_path, capsys):
    train = {"epochs": 2, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu", "evaluate_images": 50}
    values = {"name": "x", "data": {"name": "digits"}, "model": {"name": "mlp"}, "train": train}
    run = Run.for_recipe(validate(values | {"method": {"name": "dense"}}, source="test"), tmp_path)
    execute(run)
    file = tmp_path / "layers.yaml"
    words = ["sensitivity", str(run.path), "--split", "validation", "--write", str(file), "--sparsity", "0.95"]
    assert main(words) == 0
    assert f"granet train {file}" in capsys.readouterr().out
    assert "evaluate_images" not in yaml.safe_load(file.read_text())["train"]
    recipe = recipes.load(str(file))
    assert recipe.method.name == "rigl" and recipe.method.sparsity == 0.95
    budgets = {name: int(mask.sum()) for name, mask in Trainer(recipe).sparsifier.masks.items()}
    shares = dict(entry.split("=") for entry in recipe.method.distribution.split(", "))
    assert set(shares) == set(budgets)
    sizes = {name: mask.numel() for name, mask in Trainer(recipe).sparsifier.masks.items()}
    assert sum(budgets.values()) == round(0.05 * sum(sizes.values()))
    found = {name: budgets[name] / sizes[name] for name in sizes}
    assert len({round(density, 3) for density in found.values()}) == len(sizes)
    assert sorted(found, key=found.get) == sorted(found, key=lambda name: float(shares[name]))

    assert main(["sensitivity", str(run.path), "--write", str(tmp_path / "layers.txt")]) == 2
    assert "ends in .yaml" in capsys.readouterr().err
