"""Only runs of one task are set side by side; what differs is named, and whose numbers a headline shows."""

import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from granet.report import comparison
from granet.report.page import summary_tables, write_report
from granet.report.rundata import RunData, read_run
from granet.train import recipes
from granet.train.recipe import validate

SUMMARY = {
    "sparsity": 0.9, "parameters": {"total": 10, "sparse": 10, "active": 1}, "seconds": 1.0, "layers": [], "steps": 20,
    "flops": {"inference": 1.0, "inference_dense": 2.0, "training": 1.0, "training_dense": 2.0}, "best": None,
}  # fmt: skip


def run(label, method="granet", accuracy=0.5, finished=True, **changes):
    values = recipes.load("digits", method=method).model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition("_")
        values |= {section: values[section] | {name: value}} if name else {section: value}
    recipe = validate(values, source="test").to_yaml()
    summary = SUMMARY | {"name": label, "last": {"test_accuracy": accuracy}}
    summary |= {"sparsity": 0.0} if method == "dense" else {}
    return RunData(Path(label), recipe, {}, (), summary if finished else None)


def by_name(*runs):
    return {run.name: run for run in runs}


@pytest.mark.parametrize(
    ("key", "value"),
    [("data_name", "fashion-mnist"), ("data_validation", 0.2), ("model_name", "mlp"), ("train_epochs", 3)],
)
def test_another_task_is_another_group(key, value):
    runs = by_name(run("a"), run("b", **{key: value}), run("twin", "dense"))
    assert [list(group) for group in comparison.groups(runs)] == [["a", "twin"], ["b"]]
    assert comparison.pair(comparison.groups(runs)[1]) == ("b", None)


def test_what_differs_is_named_and_the_method_is_no_difference():
    group = by_name(run("a"), run("b", "rigl", train_lr=0.5, seed=3), run("c", "dense", train_log="3it"))
    differs = comparison.differences(group)
    lr = group["a"].settings["train"]["lr"]
    assert differs == {"a": f"lr {lr}, seed 0", "b": "lr 0.5, seed 3", "c": f"lr {lr}, seed 0"}
    assert not any(comparison.differences(by_name(run("a"), run("c", "dense"))).values())


def test_a_headline_compares_twins_and_no_others():
    assert comparison.pair(by_name(run("d", "dense"), run("a"))) == ("a", "d")
    assert comparison.pair(by_name(run("a", seed=1), run("b"), run("d", "dense"))) == ("b", "d")
    assert comparison.pair(by_name(run("a", seed=1), run("d", "dense"))) == ("a", "d")
    assert comparison.pair(by_name(run("a"), run("d", "dense", train_lr=0.5))) == ("a", None)
    assert comparison.pair(by_name(run("d", "dense"))) == ("d", None)
    assert comparison.pair(by_name(run("a", finished=False))) == (None, None)


def test_a_headline_is_about_the_run_that_is_asked_for(tmp_path):
    levels = [run("dense", "dense"), run("level1", accuracy=0.6), run("level2", accuracy=0.7)]
    assert comparison.pair(by_name(*levels)) == ("level1", "dense")
    assert comparison.pair(by_name(*levels), "level2") == ("level2", "dense")
    assert comparison.pair(by_name(*levels), "dense") == ("dense", None)
    assert comparison.pair(by_name(*levels), "of another group") == ("level1", "dense")
    text = write_report(levels, tmp_path / "page.html", subject="level2").read_text()
    assert "<b>level2</b>" in text and "+20.00 points to dense" in text and "<b>level1</b>" not in text


def test_runs_of_other_budgets_are_marked():
    longer = run("longer", seed=1)
    longer.summary["steps"] = 1200
    differs = comparison.differences(by_name(run("a"), longer, run("unfinished", finished=False)))
    assert differs == {"a": "seed 0, 20 steps", "longer": "seed 1, 1,200 steps", "unfinished": "seed 0"}


def test_dense_of_another_data_set_is_no_twin(tmp_path):
    page = write_report(
        [run("fashion", accuracy=0.88, data_name="fashion-mnist"), run("digits", "dense", accuracy=0.98)],
        tmp_path / "page.html",
    ).read_text()
    assert "points to" not in page
    heads = [re.sub("<.*?>", "", line) for line in page.splitlines() if 'class="headline"' in line]
    assert [head.partition(" held out")[0] for head in heads] == ["fashion: fashion-mnist (0.1", "digits: digits (0.1"]
    page = write_report([run("mine", accuracy=0.88), run("twin", "dense", accuracy=0.98)], tmp_path / "page.html")
    assert "-10.00 points to twin" in page.read_text()


def test_many_runs_have_a_colour_each(tmp_path):
    runs = [run(f"r{i}", seed=i) for i in range(20)] + [run("d0", "dense"), run("d1", "dense", seed=1)]
    page = write_report(runs, tmp_path / "page.html").read_text()
    table = page.split("<tbody>")[1].split("</tbody>")[0]
    colours = [part.split('"')[0] for part in table.split("background: ")[1:]]
    assert len(colours) == len(set(colours)) == 22


def printed(runs, width):
    out = StringIO()
    console = Console(file=out, width=width or 10_000)
    for title, table in summary_tables(runs, width):
        console.print(title)
        console.print(table)
    return out.getvalue().splitlines()


def test_a_narrow_terminal_gets_every_run_in_rows_of_whole_words():
    runs = [run(f"digits-granet-{i:06x}", seed=i) for i in range(12)]
    lines = printed(runs, 80)
    assert max(map(len, lines)) <= 80
    for one in runs:
        rows = [line for line in lines if line.strip().startswith(one.name)]
        assert len(rows) > 1 and "90.00 %" in rows[0] and f"seed {one.settings['seed']}" in rows[-1]
    assert not [line for line in lines if len(line.split()) == 1 and "─" not in line]  # no name is broken
    wide = printed(runs, None)
    assert len([line for line in wide if "digits-granet-" in line]) == 12


def test_long_names_fold_and_cost_no_number():
    lines = printed([run("x" * 70), run("y" * 70, "dense")], 60)
    assert max(map(len, lines)) <= 60
    assert "".join(lines).count("x") >= 70 and any("90.00 %" in line for line in lines)


def test_a_name_is_no_markup():
    assert any("[bold]x[/nothing]" in line for line in printed([run("[bold]x[/nothing]")], None))


@pytest.fixture
def folder(tmp_path):
    """A folder of runs as they lie around: one whole, one half made, a file."""
    whole = tmp_path / "runs/whole"
    whole.mkdir(parents=True)
    (whole / "recipe.yaml").write_text(recipes.load("digits").to_yaml())
    (whole / "metrics.jsonl").touch()
    (tmp_path / "runs/half").mkdir()
    (tmp_path / "runs/half/recipe.yaml").write_text("")
    shutil.copytree(whole, tmp_path / "runs/damaged")
    (tmp_path / "runs/damaged/recipe.yaml").write_text("[")
    (tmp_path / "runs/note.txt").touch()
    return tmp_path / "runs"


def test_what_is_no_run_is_left_out_with_a_warning(folder, capsys):
    from granet.cli import main

    page = folder / "page.html"
    paths = sorted(folder.iterdir())
    assert main(["compare", *map(str, paths), "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "whole (unfinished)" in out and page.is_file()
    assert [line.split(": ")[1:3] for line in err.splitlines()] == [["warning", "left out"]] * 3
    assert "half is not the directory of a run: it has no metrics.jsonl" in err
    assert main(["compare", str(folder / "half"), "--out", str(page)]) == 2


def test_no_file_of_others_is_written_over(folder, capsys):
    from granet.cli import main

    words = ["compare", str(folder / "whole"), "--out"]
    mine = folder / "mine.html"
    mine.write_text("<html>my own")
    assert main([*words, str(mine)]) == 2
    assert "mine.html exists and is not a page written by granet" in capsys.readouterr().err
    assert mine.read_text() == "<html>my own"
    page = folder / "page.html"
    assert main([*words, str(page)]) == 0
    assert "in place of" not in capsys.readouterr().out
    assert main([*words, str(page)]) == 0
    assert "page.html (in place of an older one)" in capsys.readouterr().out


def test_a_damaged_recipe_is_said(folder):
    with pytest.raises(ValueError, match=r"recipe\.yaml is damaged: it does not hold a recipe"):
        read_run(folder / "damaged")
    (folder / "whole/summary.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_run(folder / "whole")
