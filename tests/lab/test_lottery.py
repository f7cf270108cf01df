import itertools
from dataclasses import replace

import pytest
import torch

from granet import distribution
from granet.cli import main
from granet.lab.lottery import Lottery, LotteryError, levels, run
from granet.train import checkpoint, recipes
from granet.train.recipe import validate


def recipe(epochs=2, seed=0):
    values = recipes.load("digits").model_dump()
    values["train"] |= {"epochs": epochs, "warmup": 0, "threads": 1}
    return validate(values | {"seed": seed}, source="test")


def first(level):
    """The checkpoint that the level began from, found again by pruning the one before it once more."""
    return checkpoint.load(sorted(level.run.checkpoints.iterdir())[0])


def weights(found, masks):
    return {name: found.model[name] for name in masks}


LOTTERY = Lottery(sparsity=0.9, levels=2, rewind="0.5")


def test_every_level_has_its_exact_budget_inside_the_one_before(tmp_path):
    done = list(run(recipe(), LOTTERY, tmp_path))
    assert [level.number for level in done] == [0, 1, 2]
    states = [checkpoint.load_latest(level.run.checkpoints) for level in done]
    masks = [state.state["sparsifier"]["masks"] for state in states]
    total = sum(mask.numel() for mask in masks[0].values())
    for level, (mask, state) in enumerate(zip(masks, states, strict=True)):
        active = sum(int(m.sum()) for m in mask.values())
        assert active == distribution.budget(total, 1 - LOTTERY.sparsity_after(level))
        assert all(not state.model[name][~m].any() for name, m in mask.items())
        assert done[level].summary["sparsity"] == pytest.approx(1 - active / total)
    for outer, inner in itertools.pairwise(masks):
        assert not any((inner[name] & ~outer[name]).any() for name in inner)
    # training cost adds up, and the second level costs less than the first
    cost = [level.summary["flops"]["training"] for level in done]
    assert cost[0] < cost[1] < cost[2] and cost[2] - cost[1] < cost[1] - cost[0] < cost[0]
    assert [level.summary["steps"] for level in done] == [40, 40, 40]


@pytest.mark.parametrize("mode", ["weights", "learning-rate"])
@pytest.mark.parametrize("rewind", ["0", "0.5"])
def test_a_level_begins_with_the_weights_that_its_mode_says(mode, rewind, tmp_path):
    lottery = Lottery(sparsity=0.5, levels=1, mode=mode, rewind=rewind)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 40  # right after the first step of level 1

    assert [level.number for level in run(recipe(), lottery, tmp_path, stop=stop)] == [0]
    zero, one = levels(recipe(), lottery, tmp_path)
    assert one.summary is None
    start = first(one)
    assert start.step == {"0": 0, "0.5": 10}[rewind]
    masks = start.state["sparsifier"]["masks"]
    trained = checkpoint.load_latest(zero.run.checkpoints)
    if mode == "learning-rate":
        source = trained.model
    elif rewind == "0":
        from granet.train.trainer import Trainer

        source = Trainer(zero.run.recipe).model.state_dict()
    else:
        source = checkpoint.load(zero.run.checkpoints / "00000010").model
    for name in masks:
        assert torch.equal(start.model[name], source[name])
    # kept are the largest of the trained weights
    every = torch.cat([trained.model[name].abs()[mask] for name, mask in masks.items()])
    gone = torch.cat([trained.model[name].abs()[~mask] for name, mask in masks.items()])
    assert every.min() >= gone.max()


@pytest.mark.parametrize("mode", ["weights", "learning-rate"])
def test_the_average_goes_back_with_the_weights(mode, tmp_path):
    averaged = recipe()
    averaged = averaged.model_copy(update={"train": averaged.train.model_copy(update={"ema": 0.999})})
    lottery = Lottery(sparsity=0.5, levels=1, mode=mode, rewind="0.5")
    asked = []
    list(run(averaged, lottery, tmp_path, stop=lambda: asked.append(1) or len(asked) > 40))
    found = levels(averaged, lottery, tmp_path)
    begun = first(found[1])
    source = checkpoint.load(found[0].run.checkpoints / ("00000010" if mode == "weights" else "00000040"))
    for name, mask in begun.state["sparsifier"]["masks"].items():
        assert torch.equal(begun.state["ema"][name], source.state["ema"][name].where(mask, 0))


def test_a_moment_too_late_and_a_pattern_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(LotteryError, match="the training ends at step 40"):
        list(run(recipe(), replace(LOTTERY, rewind="9"), tmp_path))
    assert not list(tmp_path.glob("*/checkpoints/*"))
    patterned = recipe()
    patterned = patterned.model_copy(update={"model": patterned.model.model_copy(update={"pattern": "2:4"})})
    with pytest.raises(LotteryError, match="no pattern '2:4'"):
        list(run(patterned, LOTTERY, tmp_path))


def test_a_stopped_procedure_ends_as_one_that_ran_through(tmp_path):
    through = list(run(recipe(), LOTTERY, tmp_path / "through"))
    steps = iter(range(10_000))
    done = []
    for _ in range(3):
        begun = next(steps)
        done = list(run(recipe(), LOTTERY, tmp_path / "pieces", stop=lambda begun=begun: next(steps) - begun > 33))
    done = done if len(done) == 3 else list(run(recipe(), LOTTERY, tmp_path / "pieces"))
    for a, b in zip(through, done, strict=True):
        one, other = (checkpoint.load_latest(level.run.checkpoints).model for level in (a, b))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sparsity": 1.0}, "above 0 and below 1"),
        ({"levels": 0}, "at least 1"),
        ({"mode": "both"}, "modes are weights, learning-rate"),
        ({"scope": "local"}, "scopes global and layerwise"),
    ],
)
def test_impossible_procedures_are_refused(given, says):
    with pytest.raises(LotteryError, match=says):
        replace(LOTTERY, **given)


@pytest.mark.parametrize(("rewind", "says"), [("2", "leaves nothing to train"), ("soon", "not a number of steps")])
def test_impossible_moments_are_refused(rewind, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        list(run(recipe(epochs=1), replace(LOTTERY, rewind=rewind), tmp_path))


def test_the_command_shows_every_level_and_one_shot_is_one_level(tmp_path, capsys):
    words = ["lottery", "digits", "--train.epochs", "1", "--train.warmup", "0", "--runs", str(tmp_path)]
    words += ["--lottery.levels", "1", "--lottery.mode", "learning-rate", "--lottery.rewind", "50%"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "level 0: 0.0% sparse" in out
    assert "level 1: 90.0% sparse" in out
    assert list(tmp_path.glob("*/levels.html"))
    assert main(words) == 0  # all of it is there already
