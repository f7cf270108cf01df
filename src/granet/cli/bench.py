"""`granet bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """Speed of a network on granet's sparse kernels, layer by layer, beside dense. CPU only.

examples:
  granet bench runs/digits-granet-3f9a1c                 inference with the weights of a run
  granet bench runs/digits-granet-3f9a1c --precision int8   calibrated on its training images, with accuracy
  granet bench runs/digits-granet-3f9a1c --save-compiled digits.granet   for granet.load_compiled
  granet bench runs/digits-granet-3f9a1c --training      a training step
  granet bench resnet50 --size 224 --sparsity 0.95       a model by name, random weights and topology"""


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    source: tyro.conf.Positional[str]
    """Run directory, or the name of a model (`granet ls models`)."""
    training: bool = False
    """Measure a training step instead of inference."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of the compiled network. Weights of a run are tested for accuracy, too."""
    batch: int = 1
    """Number of images at a time."""
    sparsity: float = 0.9
    """Sparsity of a named model; a run keeps its own."""
    distribution: Literal["erk", "er", "uniform"] = "erk"
    """How a named model's sparsity is distributed over its layers."""
    size: int = 32
    """Height and width of a named model's images."""
    save_compiled: Path | None = None
    """File to which the compiled network is saved, for `granet.load_compiled`."""


def main(args: list[str]) -> int:
    """Prints the report; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet bench", description=DESCRIPTION)

    from granet.lab import speed

    say(speed.main(**vars(arguments)))
    return 0
