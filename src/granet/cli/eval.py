"""`granet eval`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

WORST = 5  # classes that are shown

DESCRIPTION = """Accuracy of a run's checkpoint.

examples:
  granet eval runs/digits-granet-3f9a1c
  granet eval runs/digits-granet-3f9a1c --checkpoint last --split validation
  granet eval runs/digits-granet-3f9a1c --json                             for a program to read"""


@dataclass(frozen=True)
class Arguments:
    """Which run, which of its checkpoints, on what."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    checkpoint: Literal["best", "last"] | None = None
    """Best by validation at target sparsity, or the last; the best if there is one, else the last, if not given."""
    split: Literal["train", "validation", "test"] = "test"
    """Images to evaluate on."""
    classes: bool = False
    """Print the accuracy of every class, not only of the least accurate ones."""
    json: bool = False
    """Print one JSON object instead of a line for people."""


def main(args: list[str]) -> int:
    """Prints loss, accuracy and sparsity; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet eval", description=DESCRIPTION)

    from granet.train.run import Run, load_weights
    from granet.train.trainer import Trainer

    run = Run.open(arguments.run)
    on_all = run.recipe.train.model_copy(update={"evaluate_images": None})
    trainer = Trainer(run.recipe.model_copy(update={"train": on_all}), begins=False)
    step = load_weights(run, trainer, arguments.checkpoint)
    which = "best" if trainer.best is not None and trainer.best.step == step else "last"
    which = arguments.checkpoint or which
    score = trainer.evaluate(arguments.split)
    if arguments.json:
        found = {"run": str(arguments.run), "checkpoint": which, "step": step, "split": arguments.split}
        found |= {"accuracy": score.accuracy, "accuracy_per_class": list(score.per_class), "loss": score.loss}
        found |= {"sparsity": trainer.sparsifier.sparsity}
        say(json.dumps(found))
        return 0
    say(
        f"{arguments.split} accuracy {score.accuracy:.2%}  loss {score.loss:.4f}  "
        f"sparsity {trainer.sparsifier.sparsity:.2%}  ({which} checkpoint, step {step})"
    )
    rows = sorted((share, label) for label, share in enumerate(score.per_class) if share is not None)
    shown = rows if arguments.classes else rows[:WORST]
    say(f"accuracy by class, the least first: {', '.join(f'{label} {share:.1%}' for share, label in shown)}")
    return 0
