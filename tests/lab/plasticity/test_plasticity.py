import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from granet import lab
from granet.cli import main
from granet.lab.plasticity import cell as plasticity_cell
from granet.lab.plasticity import run as plasticity_grid
from granet.lab.plasticity import study as plasticity_study
from granet.lab.plasticity.cell import Bench, exchanged, measure, prune, regenerate
from granet.lab.plasticity.findings import findings, paragraph
from granet.lab.plasticity.study import PRESETS, Cell, Study, StudyError, is_run, moments
from granet.lab.plasticity.table import Row, table
from granet.topology import count
from granet.train import checkpoint, recipes
from granet.train.optimizer import learning_rate
from granet.train.recipe import RecipeError, validate
from granet.train.run import Run, execute

TINY = ["--train.epochs", "3", "--at", "1", "2", "--retrain", "1", "--pretrained-sparsity", "0.9", "--jobs", "1"]
TINY += ["--prune", "0.5", "--regenerate", "none", "restore", "equal"]


def recipe(method=None, **train):
    values = recipes.load("plasticity-digits", method="dense").model_dump()
    values["train"] |= {"epochs": 4, "threads": 1, "device": "cpu", "keep": ("1ep", "2ep", "3ep"), **train}
    values["method"] = method or {"name": "static", "sparsity": 0.5, "distribution": "uniform"}
    return validate(values, source="test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of 4 epochs of 20 steps, learning rate dropped after 2 and 3; checkpoints after every epoch."""
    run = Run.for_recipe(recipe(), tmp_path_factory.mktemp("runs"))
    execute(run)
    return run


@pytest.fixture(scope="module")
def on(run):
    return Bench(run)


def cell(run, **values):
    settings = {"step": 20, "rate": 0.5, "arm": "none", "scope": "global", "retrain": 20, "batches": 1, "exchange": 0.5}
    return Cell(run=str(run.path), **settings | values)


def state_at(run, step):
    return checkpoint.load(run.checkpoints / f"{step:08d}")


def numbers(result):
    return {key: value for key, value in result.items() if key != "seconds"}


def test_pruning_takes_the_smallest_of_the_active_weights():
    weights = {"a": torch.tensor([[5.0, -4.0, 3.0, 9.0]]), "b": torch.tensor([[-0.1, 0.2, 0.3, 0.4]])}
    masks = {"a": torch.tensor([[True, True, True, False]]), "b": torch.ones(1, 4, dtype=torch.bool)}
    everywhere = prune(masks, weights, 0.5, "global")  # 4 of 7 stay, half up
    assert everywhere["a"].tolist() == [[True, True, True, False]]
    assert everywhere["b"].tolist() == [[False, False, False, True]]
    each = prune(masks, weights, 0.5, "layerwise")
    assert each["a"].tolist() == [[True, True, False, False]]
    assert each["b"].tolist() == [[False, False, True, True]]
    least = prune(masks, weights, 0.98, "global")
    assert [count(mask) for mask in least.values()] == [1, 1]


def test_regeneration_grows_where_the_gradient_is_largest_to_the_number_asked_for():
    kept = {"a": torch.tensor([[True, False, False, False]])}
    before = {"a": torch.tensor([[True, True, True, False]])}
    grown = regenerate(kept, before, {"a": torch.tensor([[9.0, 0.1, -0.2, 0.3]])})
    assert grown["a"].tolist() == [[True, False, True, True]]


def test_further_pruning_gives_up_a_share_of_every_layer():
    weights = {"a": torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0]])}
    masks = {"a": torch.tensor([[True, True, True, True, False]])}
    assert exchanged(masks, weights, 0.5)["a"].tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_the_arms_have_the_densities_they_promise(on, run, scope):
    found = state_at(run, 20)
    before, kept, plain = plasticity_cell.choose(on, found, cell(run, scope=scope))
    _, kept_restore, restored = plasticity_cell.choose(on, found, cell(run, arm="restore", scope=scope))
    _, kept_equal, equal = plasticity_cell.choose(on, found, cell(run, arm="equal", scope=scope))
    for name in before:
        assert count(restored[name]) == count(before[name])
        assert count(equal[name]) == count(plain[name])
        assert count(kept_equal[name]) == count(plain[name]) - count(plain[name]) // 2
        assert torch.equal(kept_restore[name], plain[name])
        assert not (kept_equal[name] & ~plain[name]).any()
    assert kept is plain
    total = sum(mask.numel() for mask in before.values())
    assert sum(map(count, plain.values())) == pytest.approx(0.25 * total, abs=2)


def test_pruned_and_regenerated_weights_and_their_momentum_start_at_zero(on, run):
    found = state_at(run, 20)
    _, kept, masks = plasticity_cell.choose(on, found, cell(run, arm="equal"))
    on.place(found, masks, kept)
    for name, p in on.trainer.model.named_parameters():
        if name not in kept:
            continue
        momentum = on.trainer.optimizer.state[p]["momentum_buffer"]
        assert not p[~kept[name]].any()
        assert not momentum[~kept[name]].any()
        assert torch.equal(p[kept[name]], found.model[name][kept[name]])
        assert momentum[kept[name]].any()


def test_a_cell_leaves_checkpoint_and_bench_as_they_were(on, run):
    """Each measurement, after whatever others, gives the same numbers."""
    first = measure(on, cell(run, arm="equal"))
    measure(on, cell(run, step=40, rate=0.9))
    again = measure(on, cell(run, arm="equal"))
    assert numbers(first) == numbers(again)
    assert numbers(measure(Bench(run), cell(run, arm="equal"))) == numbers(first)


def test_both_measures_are_what_their_definitions_say(on, run):
    """Against a plain loop: pruned after epoch 1, with the drop after epoch 2 on the way to the end."""
    result = measure(on, cell(run, retrain=30))
    found = state_at(run, 20)
    _, _, masks = plasticity_cell.choose(on, found, cell(run))

    def train(until, rate):
        on.place(found, masks)
        trainer = on.trainer
        for step in range(20, until):
            if step % 20 == 0:
                batches = list(trainer.images.epoch_from(trainer.step))
            x, y = batches[step % 20]
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate(step)
            loss = torch.nn.functional.cross_entropy(trainer.model.train()(x), y)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        for name, p in trainer.model.named_parameters():
            if name in masks:
                assert not p[~masks[name]].any()
        return trainer.evaluate("test").accuracy

    assert result["accuracy_retrained"] == train(50, lambda step: 0.1)
    settings = on.trainer.settings
    assert [learning_rate(settings, step, 80) for step in (39, 40, 60)] == pytest.approx([0.1, 0.01, 0.001])
    assert result["accuracy_final"] == train(80, lambda step: learning_rate(settings, step, 80))
    assert result["accuracy_retrained"] != result["accuracy_final"]
    assert result["plasticity"] == result["accuracy_retrained"] - result["accuracy_before"]
    assert result["final_gap"] == result["accuracy_final"] - run.summary["last"]["test_accuracy"]
    on.place(found, found.state["sparsifier"]["masks"])
    assert result["accuracy_before"] == on.accuracy()
    assert (result["epoch"], result["lr"], result["pretrained_sparsity"]) == (1, 0.1, 0.5)


def test_nothing_pruned_continues_the_run_to_the_bit(on, run):
    found = state_at(run, 40)
    on.place(found, found.state["sparsifier"]["masks"])
    assert on.train(80)
    last = state_at(run, 80)
    assert all(torch.equal(value, last.model[name]) for name, value in on.trainer.model.state_dict().items())


@pytest.mark.parametrize(("step", "retrain"), [(40, 20), (60, 20), (60, 30), (80, 20)])
def test_one_path_for_both_measures_equals_two(on, run, step, retrain, monkeypatch):
    """Where the learning rate does not change on the way, the measures share their training."""
    shared = measure(on, cell(run, step=step, retrain=retrain))
    rates = iter([0.5])  # as if it changed: the first one asked is that of the moment

    def changing(at, real=on.lr):
        return next(rates, None) or real(at)

    separate = Bench(run)
    frozen = separate.lr(step)
    monkeypatch.setattr(separate, "lr", changing)
    real_train = separate.train
    monkeypatch.setattr(separate, "train", lambda until, lr=None: real_train(until, None if lr is None else frozen))
    apart = measure(separate, cell(run, step=step, retrain=retrain))
    assert shared["accuracy_final"] == apart["accuracy_final"]
    assert shared["accuracy_retrained"] == apart["accuracy_retrained"]


def test_a_moving_average_is_pruned_along(tmp_path):
    run = Run.for_recipe(recipe(ema=0.9, epochs=2), tmp_path)
    execute(run)
    bench = Bench(run)
    result = measure(bench, cell(run, arm="equal", rate=0.9))
    for name, mask in bench.trainer.sparsifier.masks.items():
        assert not dict(bench.trainer.ema.named_parameters())[name][~mask].any()
    assert 0 < result["accuracy_retrained"] <= 1


@pytest.mark.slow
def test_the_command_makes_everything_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plasticity", *TINY]) == 0
    out = capsys.readouterr().out
    place = tmp_path / "plasticity" / "plasticity-digits"
    made = sorted((place / "cells").iterdir())
    assert len(made) == 2 * 3
    rows = list(csv.DictReader((place / "plasticity.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert {row["arm"] for row in rows} == {"none", "restore", "equal"}
    for file in ("plasticity.svg", "final-gap.svg"):
        assert (place / file).read_text().startswith("<svg")
    page = (place / "plasticity.html").read_text()
    text = (place / "plasticity.md").read_text()
    for finding in ("Plasticity falls at every drop", "Regeneration helps most"):
        assert finding in page
        assert finding in text
        assert finding in out
    assert "6/6" in out

    # a cell more for every missing one, and none of the others again
    stamps = {path: path.stat().st_mtime_ns for path in made}
    made[3].unlink()
    made[5].write_text("{")  # a damaged one is made again
    assert main(["plasticity", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.count("  rate ") == 2
    assert "trained" in out
    after = {path: path.stat().st_mtime_ns for path in made}
    assert {path for path in made if after[path] != stamps[path]} == {made[3], made[5]}

    # the networks it trained are runs: their own checkpoints can be studied as well
    network = next((place / "runs").iterdir())
    assert (
        main(["plasticity", str(network), "--prune", "0.5", "--regenerate", "none", "--at", "2", "--retrain", "1"]) == 0
    )
    assert (network / "plasticity" / "plasticity.csv").read_text().count("\n") == 2


@pytest.mark.slow
def test_a_grid_that_is_interrupted_keeps_what_it_has(tmp_path):
    command = [sys.executable, "-m", "granet.cli", "plasticity", *TINY]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    cells = tmp_path / "plasticity" / "plasticity-digits" / "cells"
    while not (cells.is_dir() and list(cells.glob("*.json"))):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=250)
    if process.returncode == 0:
        pytest.skip("it was done before it could be interrupted")
    assert process.returncode == 130
    assert "the same command goes on" in out
    assert all(json.loads(path.read_text())["seconds"] > 0 for path in cells.glob("*.json"))
    assert (cells.parent / "plasticity.csv").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "6/6" in done.stdout


@pytest.mark.slow
def test_in_a_notebook(tmp_path):
    found = lab.plasticity(
        recipe(epochs=2), at=("1",), retrain="1", prune=(0.5,), regenerate=("none",), pretrained_sparsity=(0,),
        seeds=(0, 1), out=tmp_path, jobs=2,
    )  # fmt: skip
    assert [row.seed for row in found.rows] == [0, 1]
    assert found.to_csv(tmp_path / "x.csv") == (tmp_path / "x.csv").read_text()
    assert "pretrained" in str(found)
    spec = found.figure("final_gap").to_dict()
    values = spec["data"]["values"]  # of the only panel
    assert [value["seeds"] for value in values] == [2]
    assert values[0]["low"] <= values[0]["mean"] <= values[0]["high"]
    with pytest.raises(ValueError, match="no measure 'gap'"):
        found.figure("gap")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regenerate": ("retore",)}, "no arm 'retore' of regeneration; did you mean 'restore'"),
        ({"prune": (0.5, 1.0)}, "above 0 and below 1, got 1.0"),
        ({"pretrained_sparsity": (1.0,)}, "from 0 and below 1, got 1.0"),
        ({"scope": "locally"}, "scope 'locally' is not possible"),
        ({"exchange": 0.0}, "exchange is a share"),
        ({"batches": 0}, "at least one"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_impossible_studies_are_refused(changes, says):
    with pytest.raises(StudyError, match=says):
        Study(**changes)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--at", "13"], "at 13: the training has 12 epochs (240 steps)"),
        (["--at", "0"], "at 0: the training has 12 epochs"),
        (["--at", "soon"], "'soon' is no moment"),
        (["--retrain", "0"], "less than a step"),
        (["--regenerate", "all"], "there is no arm 'all'"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    assert main(["plasticity", "plasticity-digits", *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_meant_where_a_folder_has_its_name(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plasticity-digits").mkdir()
    (tmp_path / "other").mkdir()
    assert not is_run("plasticity-digits") and not is_run("digits") and not is_run("nowhere")
    assert is_run("other") and is_run(run.path)


def test_runs_that_cannot_be_studied_say_why(tmp_path, run):
    with pytest.raises(RecipeError, match="there is no recipe 'digitz'"):
        plasticity_grid.plan("digitz")
    with pytest.raises(StudyError, match=r"no checkpoint at step 30; it has 20, 40, 60, 80"):
        plasticity_grid.plan(run.path, Study(at=("1.5",)))
    assert plasticity_grid.plan(run.path).steps == (20, 40, 60, 80)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text(recipe().to_yaml())
    with pytest.raises(StudyError, match="is not finished: `granet resume"):
        plasticity_grid.plan(unfinished)
    shutil.copy(run.path / "summary.json", unfinished)
    with pytest.raises(StudyError, match="has no checkpoints, so there is nothing to prune"):
        plasticity_grid.plan(unfinished)


def test_a_cell_is_named_by_all_that_it_depends_on_and_nothing_else(tmp_path):
    base, one = recipe(), Cell("runs/a", 20, 0.5, "equal", "global", 20, 1, 0.5)
    file = one.file(tmp_path, base)
    quiet = base.model_copy(update={"train": base.train.model_copy(update={"keep": ("7ep",), "log": 3})})
    assert dataclasses.replace(one, run="elsewhere/a").file(tmp_path, quiet) == file
    for change in ({"step": 40}, {"rate": 0.2}, {"arm": "restore"}, {"scope": "layerwise"}, {"retrain": 10},
                   {"batches": 2}, {"exchange": 0.3}):  # fmt: skip
        assert dataclasses.replace(one, **change).file(tmp_path, base) != file
    assert one.file(tmp_path, base.model_copy(update={"seed": 1})) != file
    plain = dataclasses.replace(one, arm="none")
    assert dataclasses.replace(plain, batches=9, exchange=0.1).file(tmp_path, base) == plain.file(tmp_path, base)


@pytest.mark.parametrize("name", PRESETS)
def test_the_studies_of_the_package_are_possible(name):
    source, study = PRESETS[name]
    steps = moments(study, plasticity_study.load_recipe(source), 100)
    assert len(steps) == len(study.at)


def test_the_papers_study_has_the_papers_grid():
    source, study = plasticity_study.resolve("resnet20-paper")
    base = plasticity_study.load_recipe(source)
    assert (base.model.name, base.data.name, base.train.epochs, base.train.milestones) == (
        "resnet20", "cifar10", 160, ("50%", "75%"),
    )  # fmt: skip
    assert study.prune == study.pretrained_sparsity[1:2] * 0 + (0.2, 0.5, 0.9, 0.98)
    assert study.pretrained_sparsity == (0.0, 0.5, 0.9, 0.98)
    assert moments(study, base, 351)[0] == 3510
    assert plasticity_study.retraining(study, base, 351) == 30 * 351


def made_up(effect, seeds=3, drops=(4.0, 8.0), noise=0.001):
    """A table whose plasticity and gap are ``effect(sparsity, rate, arm, phase)`` in points, with a little noise."""
    results, draws = [], torch.Generator().manual_seed(0)
    for seed in range(seeds):
        for sparsity in (0.0, 0.9):
            for rate in (0.2, 0.5, 0.9, 0.98):
                for arm in ("none", "restore", "equal"):
                    for epoch in (1, 3, 5, 7, 9, 11):
                        value = effect(sparsity, rate, arm, sum(epoch >= drop for drop in drops)) / 100
                        value += noise * float(torch.randn((), generator=draws))
                        results.append(
                            Row(sparsity, seed, epoch * 10, epoch, 0.1, rate, arm, "global", 1 - sparsity, 0.1, 0.8,
                                0.8 + value, value, 0.9, 0.9 + value, value, 1.0)
                        )  # fmt: skip
    return table(
        "made-up", [dataclasses.asdict(row) for row in results], epochs=12, drops=drops, retrain=2.0, tested=10_000
    )


def like_the_paper(sparsity, rate, arm, phase):
    """Points: high first, falling by 2 and then by 6, more at high rates; regeneration mends most there."""
    value = 3 - (0, 2, 8)[phase] * (0.3 + rate)
    if rate > 0.8 and arm != "none":
        value += 3
    return max(value, 0.5) if rate == 0.2 else value


def test_findings_hold_where_the_numbers_are_like_the_papers():
    judged = {finding.claim: finding for finding in findings(made_up(like_the_paper))}
    assert [finding.verdict for finding in judged.values()] == ["holds"] * 7
    falls = judged["Plasticity falls at every drop of the learning rate"]
    assert "16 of 16 falls for, 0 against" in falls.figures


def test_findings_do_not_hold_where_the_numbers_are_the_opposite():
    judged = findings(made_up(lambda *where: -like_the_paper(*where)))
    assert {finding.verdict for finding in judged} == {"does not hold"}


def test_findings_are_undecided_where_noise_is_all_there_is():
    judged = {finding.claim: finding.verdict for finding in findings(made_up(lambda *where: 0.0, noise=0.02))}
    free = judged.pop("A pruning rate of 0.2 is nearly free")  # what changes nothing is free, if that can be told
    assert free != "does not hold"
    assert set(judged.values()) == {"undecided"}


def test_many_small_differences_decide_together():
    """No curve falls by more than its noise, all of them together do."""
    judged = findings(made_up(lambda sparsity, rate, arm, phase: -0.4 * phase, noise=0.01, seeds=2))
    falls = next(finding for finding in judged if finding.claim.startswith("Plasticity falls"))
    votes = int(falls.figures.partition("; ")[2].split(" of ")[0])
    assert falls.verdict == "holds" and votes < 8


def test_findings_need_what_they_are_about():
    """Without drops there is no fall, without the other arms no gain; one seed has the noise of the test set."""
    judged = {finding.claim: finding for finding in findings(made_up(like_the_paper, seeds=1, drops=()))}
    assert judged["Plasticity falls at every drop of the learning rate"].verdict == "undecided"
    assert judged["Regeneration helps most at high pruning rates"].verdict == "holds"
    assert (
        "noise of 1.13 points" in judged["Regeneration helps most at high pruning rates"].figures
    )  # 2 sqrt(2 .8 .2 / 1e4)
    alone = made_up(like_the_paper)
    alone = dataclasses.replace(alone, rows=tuple(row for row in alone.rows if row.arm == "none"))
    judged = {finding.claim: finding for finding in findings(alone)}
    assert judged["Regeneration helps most at high pruning rates"].verdict == "undecided"
    with pytest.raises(ValueError, match="no rows to judge"):
        findings(dataclasses.replace(alone, rows=()))


def test_the_paragraph_says_the_numbers():
    said = paragraph(made_up(like_the_paper, noise=0.0))
    assert "plasticity is highest at epoch 1 of 12 (+3.00 points)" in said
    assert "drop at epoch 4 to those after it, plasticity changes by -1.00 at rate 0.2, -1.60 at rate 0.5" in said
    assert "the arm `restore` changes plasticity by +0.00 at rate 0.2, +0.00 at rate 0.5, +3.00 at rate 0.9" in said


def test_every_panel_shows_its_own_cells_where_others_are_missing():
    whole = made_up(like_the_paper, noise=0.0)
    part = dataclasses.replace(
        whole, rows=tuple(row for row in whole.rows if (row.arm, row.pretrained_sparsity) != ("none", 0))
    )
    panels = part.figure().to_dict()["vconcat"]
    shown = [[panel["data"]["values"] for panel in row["hconcat"]] for row in panels]
    assert [[len(values) for values in row] for row in shown] == [[0, 24], [24, 24], [24, 24]]
    assert {(value["arm"], value["sparsity"]) for value in shown[1][0]} == {("restore", "0.0")}


def test_arms_are_compared_where_both_are_made():
    """A cell that is missing takes its counterpart out, rather than shift a mean."""
    whole = made_up(like_the_paper, noise=0.0)
    rows = tuple(row for row in whole.rows if row.arm == "none" or row.epoch < 4)
    part = dataclasses.replace(whole, rows=rows, missing=len(whole.rows) - len(rows))
    said = paragraph(part)
    assert said.startswith(f"{part.missing} cells of the study are missing")
    assert "the arm `restore` changes plasticity by +0.00 at rate 0.2, +0.00 at rate 0.5, +3.00 at rate 0.9" in said
    assert set(part.gain("plasticity", "restore", "none")) == {
        (row.pretrained_sparsity, row.rate, row.step, row.seed) for row in rows if row.arm == "restore"
    }
