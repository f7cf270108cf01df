"""`granet eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """Accuracy of a run's checkpoint.

examples:
  granet eval runs/digits-granet-3f9a1c
  granet eval runs/digits-granet-3f9a1c --checkpoint last --split validation"""


@dataclass(frozen=True)
class Arguments:
    """Which run, which of its checkpoints, on what."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    checkpoint: Literal["best", "last"] = "best"
    """Best by validation at target sparsity, or the last."""
    split: Literal["train", "validation", "test"] = "test"
    """Images to evaluate on."""


def main(args: list[str]) -> int:
    """Prints loss, accuracy and sparsity; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet eval", description=DESCRIPTION)

    from granet.run import Run, load_weights
    from granet.trainer import Trainer

    run = Run.open(arguments.run)
    trainer = Trainer(run.recipe)
    step = load_weights(run, trainer, arguments.checkpoint)
    score = trainer.evaluate(arguments.split)
    say(
        f"{arguments.split} accuracy {score.accuracy:.2%}  loss {score.loss:.4f}  "
        f"sparsity {trainer.sparsifier.sparsity:.2%}  ({arguments.checkpoint} checkpoint, step {step})"
    )
    return 0
