import re

import pytest
import torch

from granet.cli import main
from granet.lab.connectivity import ALL, connectivity_of, overlap, units
from granet.topology import count, random_masks
from granet.train import checkpoint
from granet.train.checkpoint import CheckpointError
from granet.train.recipe import validate
from granet.train.run import Run, execute


def recipe(seed=0, model="mlp", **method):
    settings = {"epochs": 3, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu", "keep": ["1ep", "2ep"]}
    method = {"name": "rigl", "sparsity": 0.9, "interval": "7it", "end": "100%"} | method
    values = {"name": "x", "data": {"name": "digits"}, "model": {"name": model}, "method": method, "train": settings}
    return validate(values | {"seed": seed}, source="test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = [Run.for_recipe(recipe(seed), folder) for seed in (0, 1)]
    for run in found:
        execute(run)
    return found


def test_overlap_by_counting():
    a = {"w": torch.tensor([[True, True, True, False]]), "v": torch.tensor([[True, False]])}
    b = {"w": torch.tensor([[True, True, False, True]]), "v": torch.tensor([[False, True]])}
    found = overlap(a, b)
    assert found["w"] == (2 / 4, (9 / 4) / (6 - 9 / 4))
    assert found["v"] == (0, 0.5 / 1.5)
    assert found[ALL] == (2 / 6, (9 / 4 + 0.5) / (8 - 9 / 4 - 0.5))
    with pytest.raises(ValueError, match="different models: 'v'"):
        overlap(a, {"w": a["w"]})


def test_random_masks_overlap_by_chance():
    rng = torch.Generator().manual_seed(0)
    a, b = (random_masks({"w": n}, {"w": (300, 300)}, rng) for n in (9000, 27000))
    jaccard, chance = overlap(a, b)["w"]
    assert jaccard == pytest.approx(chance, rel=0.03)


def test_units_that_are_cut_off():
    mask = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    mask[0, 0, 1, 1] = mask[1, 0, 0, 0] = mask[1, 2, 0, 1] = True
    assert units(mask) == (2, 1)
    assert units(torch.eye(3, 5, dtype=torch.bool)) == (0, 2)


def test_between_runs_and_through_a_run(runs):
    found = connectivity_of([run.path for run in runs])
    masks = [
        {step: checkpoint.load(run.checkpoints / f"{step:08d}").state["sparsifier"]["masks"] for step in (20, 40, 60)}
        for run in runs
    ]
    between = {one.layer: one for one in found.overlaps if one.kind == "between runs"}
    a, b = masks[0][60], masks[1][60]
    assert between["2.weight"].jaccard == count(a["2.weight"] & b["2.weight"]) / count(a["2.weight"] | b["2.weight"])
    assert between[ALL].jaccard == pytest.approx(between[ALL].chance, abs=0.1)  # other seeds, other masks
    through = [one for one in found.overlaps if one.kind == "through a run" and one.layer == ALL]
    assert len(through) == 2 * 3  # 20-40, 40-60 and 20-60, of both
    assert all(one.jaccard > 2 * one.chance for one in through)
    layers = {(one.run, one.layer): one for one in found.layers}
    first = layers[runs[0].path.name, "2.weight"]
    assert first.exploration > first.density
    assert first.without_outputs == int((~a["2.weight"].any(0)).sum())
    assert first.without_inputs == int((~a["2.weight"].any(1)).sum())
    assert f"{first.density:.2%}" in str(found)


def test_the_command(runs, capsys, tmp_path):
    assert main(["connectivity", *(str(run.path) for run in runs), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "between runs" in out
    assert "by chance" in out
    assert (tmp_path / "connectivity.csv").read_text().startswith("kind,first,second,layer,jaccard,chance\n")
    assert (tmp_path / "connectivity.svg").read_text().startswith("<svg")
    page = (tmp_path / "connectivity.html").read_text()
    densities = re.findall(r"\d+\.\d\d%", out.partition("through a run")[0])
    assert densities and all(f">{density}</td>" in page for density in densities)  # formatted as in the terminal


def test_what_cannot_be_compared_says_why(runs, tmp_path, capsys):
    with pytest.raises(ValueError, match="give one or several"):
        connectivity_of([])
    other = Run.for_recipe(recipe(model="digits-cnn"), tmp_path)
    execute(other)
    with pytest.raises(ValueError, match="different models"):
        connectivity_of([runs[0], other])
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        connectivity_of(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text(recipe().to_yaml())
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        connectivity_of(empty)
