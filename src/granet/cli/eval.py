"""`granet eval`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

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
    json: bool = False
    """Print one JSON object instead of a line for people."""


def main(args: list[str]) -> int:
    """Prints loss, accuracy and sparsity; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet eval", description=DESCRIPTION)

    from granet.train.run import Run, load_weights
    from granet.train.trainer import Trainer

    run = Run.open(arguments.run)
    trainer = Trainer(run.recipe, begins=False)
    step = load_weights(run, trainer, arguments.checkpoint)
    which = "best" if trainer.best is not None and trainer.best.step == step else "last"
    which = arguments.checkpoint or which
    score = trainer.evaluate(arguments.split)
    if arguments.json:
        found = {"run": str(arguments.run), "checkpoint": which, "step": step, "split": arguments.split}
        found |= {"accuracy": score.accuracy, "loss": score.loss, "sparsity": trainer.sparsifier.sparsity}
        say(json.dumps(found))
        return 0
    say(
        f"{arguments.split} accuracy {score.accuracy:.2%}  loss {score.loss:.4f}  "
        f"sparsity {trainer.sparsifier.sparsity:.2%}  ({which} checkpoint, step {step})"
    )
    return 0
