import csv
import dataclasses
import io
from pathlib import Path

import pytest

from granet.lab.sweep import grid, table
from granet.lab.sweep.run import Done
from granet.train.run import Run

VALUES = {
    "name": "tiny",
    "recipe": ["digits", "fashion"],
    "methods": ["dense", "static", {"name": "rigl", "label": "long", "train.epochs": 20}],
    "grid": {"method.sparsity": [0.9, 0.98], "train": {"epochs": 10, "lr": [0.1, 0.05]}},
    "seeds": [0, 1],
    "report": {"compare": [["static", "dense"], ["long", "static"]]},
}


def summary(cell, accuracy, *, steps=100, best=True):
    """What a run of this cell would say: the fields that tables read, in the form of `granet.train.run`."""
    density = 1 - (cell.at("method.sparsity") or 0)
    steps *= cell.recipe.train.epochs // 10
    score = {"step": steps, "validation_accuracy": accuracy, "test_accuracy": accuracy}
    return {
        "sparsity": 1 - density,
        "parameters": {"total": 1000, "sparse": 1000, "active": round(1000 * density)},
        "flops": {
            "inference": 10 * density, "inference_dense": 10,
            "training": 30 * density * steps, "training_dense": 30 * steps,
        },
        "last": score, "best": score | {"test_accuracy": accuracy + 0.01} if best else None,
        "seconds": 2.0, "steps": steps, "epochs": cell.recipe.train.epochs, "exploration": density,
    }  # fmt: skip


@pytest.fixture
def tiny():
    return grid.parse(VALUES, source=Path("tiny.toml"))


@pytest.fixture
def done(tiny):
    """The whole grid; a method's accuracy is known, its two seeds two points apart."""
    base = {"dense": 0.9, "static": 0.8, "long": 0.84}
    return [
        Done(cell, Run(Path("runs") / f"{i}", cell.recipe), summary(cell, base[cell.label] + 0.02 * cell.recipe.seed))
        for i, cell in enumerate(grid.cells(tiny))
    ]


def test_lines_are_ordered_by_recipe_sparsity_settings_and_method(tiny, done):
    lines = table.rows(tiny, reversed(done))
    half = len(lines) // 2
    assert [line.task for line in lines] == ["digits"] * half + ["fashion"] * half
    assert [(line.target, line.label, dict(line.settings)["train.lr"]) for line in lines[:half]] == [
        (None, "dense", 0.1),
        (None, "dense", 0.05),
        *((s, label, lr) for s in (0.9, 0.98) for lr in (0.1, 0.05) for label in ("static", "long")),
    ]
    assert {len(line.runs) for line in lines} == {2}


def test_flops_of_a_longer_run_are_relative_to_what_the_others_had(tiny, done):
    lines = {(line.label, line.target): line for line in table.rows(tiny, done) if line.task == "digits"}
    assert lines["static", 0.9].training == pytest.approx(0.1)
    assert lines["long", 0.9].training == pytest.approx(0.2)
    assert lines["long", 0.9].inference == pytest.approx(0.1)
    assert lines["dense", None].training == pytest.approx(1)
    assert lines["long", 0.9].differs == ("train.epochs 20 instead of 10",)
    assert lines["static", 0.9].differs == lines["dense", None].differs == ()


def test_more_steps_than_the_recipe_says_are_marked(tiny, done):
    """As iterative pruning has, which trains several times."""
    found = [
        Done(one.cell, one.run, summary(one.cell, 0.5, steps=300 if one.cell.label == "static" else 100))
        for one in done
        if one.cell.label != "long"
    ]
    marks = {line.label: line.differs for line in table.rows(tiny, found)}
    assert marks["static"] == ("300 steps instead of 100",)
    assert marks["dense"] == ()


def test_unfinished_runs_and_those_without_a_best_are_marked(tiny, done):
    first, second = (one for one in done if one.cell == done[0].cell or one.run == done[0].run), done[1]
    cell = next(first).cell
    changed = [
        Done(one.cell, one.run) if one.cell is cell
        else Done(one.cell, one.run, summary(one.cell, 0.7, best=False)) if one is second
        else one
        for one in done
    ]  # fmt: skip
    notes = [note for line in table.rows(tiny, changed) for note in line.differs if "instead" not in note]
    assert notes == ["1 of 2 runs are finished", "1 of 2 runs have no best: never evaluated at the target sparsity"]
    assert table.rows(tiny, [Done(one.cell, one.run) for one in done]) == []


def test_the_text_is_aligned_and_says_what_differs(tiny, done):
    text = table.text(tiny, table.rows(tiny, done)).splitlines()
    head, rule, *lines, note = text
    assert head.split()[:3] == ["recipe", "method", "sparsity"]
    assert set(rule) == {"-"}
    assert note == "[1] train.epochs 20 instead of 10"
    place = head.index("training") + len("training \N{MULTIPLICATION SIGN}")
    assert {line[place - 5 : place] for line in lines if " static " in line} == {"0.100", "0.020"}
    assert all(line.endswith("[1]") == (" long " in line) for line in lines)
    assert "81.00 ± 1.41" in text[4]


def test_gaps_are_of_equal_settings_with_their_standard_error(tiny, done):
    found = table.gaps(tiny, table.rows(tiny, done))
    assert len(found) == 2 * (4 + 4)  # recipes x (static to dense + long to static), two sparsities, two rates each
    one = next(g for g in found if (g.ours, g.other) == ("long", "static"))
    assert one.points == pytest.approx(4)
    assert one.error == pytest.approx(2**0.5)  # two means of two values, 2 points apart: variance 2, over 2, twice
    assert one.verdict == "better"
    assert str(one) == "digits, 90%, train.lr 0.1: long - static = +4.00 ± 1.41: better"
    assert {g.verdict for g in found if g.other == "dense"} == {"worse"}


def test_a_gap_names_both_settings_where_they_differ(tiny, done):
    lines = table.rows(tiny, done)
    one = next(line for line in lines if line.label == "static")
    ours = dataclasses.replace(one, settings=(("method.interval", 10), ("train.lr", 0.1)))
    other = dataclasses.replace(one, settings=(("method.interval", 20), ("train.lr", 0.1)))
    assert table.gap(ours, other).where.endswith("method.interval 10 against 20, train.lr 0.1")
    assert table.gap(ours, ours).where.endswith("method.interval 10, train.lr 0.1")


def test_one_seed_is_no_evidence(tiny, done):
    first = [one for one in done if one.cell.recipe.seed == 0]
    assert {g.verdict for g in table.gaps(tiny, table.rows(tiny, first))} == {"one seed says nothing about this"}


def test_the_choice_of_weights_counts(tiny, done):
    worse = [Done(one.cell, one.run, summary(one.cell, 0.5, best=one.cell.label == "static")) for one in done]
    static, longer = (
        next(line for line in table.rows(tiny, worse) if line.label == label) for label in ("static", "long")
    )
    assert static.accuracies("best") == [0.51, 0.51]
    assert static.accuracies("last") == [0.5, 0.5]
    assert table.gap(static, longer, "last").points == pytest.approx(0)
    assert table.gap(static, longer, "best") is None


def test_csv_has_every_finished_run(tiny, done):
    rows = list(csv.DictReader(io.StringIO(table.runs_csv(tiny, [*done[1:], Done(done[0].cell, done[0].run)]))))
    assert len(rows) == len(done) - 1
    longer = next(row for row in rows if row["method"] == "long")
    assert longer["differs"] == "train.epochs 20 instead of 10"
    assert float(longer["training_ratio"]) == pytest.approx(2 * (1 - float(longer["target_sparsity"])))
    assert longer["train.lr"] in ("0.1", "0.05")


def test_runs_of_an_older_version_have_no_exploration(tiny, done):
    old = [Done(one.cell, one.run, {k: v for k, v in one.summary.items() if k != "exploration"}) for one in done]
    assert {line.exploration for line in table.rows(tiny, old)} == {None}
