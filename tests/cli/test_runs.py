"""What commands make of a run that is there: its checkpoints, its data, its recipe."""

import json
from pathlib import Path

import pytest

from granet.train.run import Run

TINY = ["train", "digits", "--model.name", "mlp", "--train.epochs", "2", "--train.warmup", "0", "--train.threads", "1"]
TINY += ["--method.interval", "7it"]


@pytest.fixture
def trained(say):
    """A finished run in the folder one stands in."""
    assert say(*TINY)[0] == 0
    (path,) = Path("runs").iterdir()
    return path


def test_eval_and_sensitivity_take_the_best_checkpoint_or_else_the_last(say, trained):
    best = Run.open(trained).summary["best"]
    found = json.loads(say("eval", trained, "--json")[1])
    assert found == {
        "run": str(trained), "checkpoint": "best", "step": best["step"], "split": "test",
        "accuracy": best["test_accuracy"], "accuracy_per_class": best["test_accuracy_per_class"],
        "loss": found["loss"], "sparsity": found["sparsity"],
    }  # fmt: skip
    worst = min(best["test_accuracy_per_class"])
    few, every = say("eval", trained)[1], say("eval", trained, "--classes")[1]
    assert f"{worst:.1%}" in few and few.count("%") == 2 + 5 and every.count("%") == 2 + 10
    pruned = say("sensitivity", trained, "--sparsities", "0.99")[1]
    assert f"{100 * best['test_accuracy']:.2f} unpruned" in pruned
    last = say("eval", trained, "--checkpoint", "last")[1]
    assert f"(last checkpoint, step {Run.open(trained).summary['last']['step']})" in last


def test_without_a_best_checkpoint_the_last_is_taken(say):
    from granet.train import recipes
    from granet.train.run import execute

    run = Run.for_recipe(recipes.load("digits"), Path("runs"))  # dense beyond its target at the first step
    assert execute(run, stop=lambda: True) is None
    found = json.loads(say("eval", run.path, "--json")[1])
    assert (found["checkpoint"], found["step"]) == ("last", 1)
    assert say("eval", run.path, "--checkpoint", "best")[0] == 2
    code, out, _ = say("sensitivity", run.path, "--sparsities", "0.999")
    assert code == 0 and "unpruned" in out


def test_both_say_the_same_of_their_default(say):
    said = [" ".join(say(command, "--help")[1].replace("│", " ").split()) for command in ("eval", "sensitivity")]
    assert all("the best if there is one, else the last, if not given" in text for text in said)


def test_an_edited_recipe_is_one_clear_line(say, trained):
    file = trained / "recipe.yaml"
    file.write_text(file.read_text().replace("name: mlp", "name: digits-cnn"))
    for command in ("eval", "sensitivity"):
        code, _, err = say(command, trained)
        assert code == 2 and "does not fit" in err and "Traceback" not in err and err.count("\n") == 1


def test_another_folder_of_data_is_not_taken_in_silence(say, trained, tmp_path):
    code, out, _ = say(*TINY, "--data.root", tmp_path / "elsewhere")
    assert code == 0 and "is finished already" in out
    assert f"its data were in the default folder, not in {tmp_path}/elsewhere; if they are other data, give" in out
    assert "its data were" not in say(*TINY)[1]


def test_a_quick_look_says_what_it_is_and_is_not_extended(say):
    code, out, _ = say(*TINY, "--max-steps", "3", "--train.evaluate-images", "40")
    (path,) = Path("runs").iterdir()
    assert code == 0 and Run.open(path).summary["steps"] == 3
    assert "at most 40 images" in " ".join(out.split())
    whole = json.loads(say("eval", path, "--json")[1])["accuracy"]
    assert whole * 360 == pytest.approx(round(whole * 360), abs=1e-6)  # all test images, not 40
    code, _, err = say("resume", path, "--epochs", "4")
    assert code == 2 and "train it without train.max_steps first" in " ".join(err.split())
