"""`granet export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """A network as a file for another runtime. Before the file is kept, its outputs are compared with those
of the network, on the run's test images; the largest deviation is printed.

examples:
  granet export runs/digits-granet-3f9a1c --to onnx
  granet export runs/digits-granet-3f9a1c --to onnx --precision int8   calibrated on 512 training images
  granet export resnet50 --to onnx --size 224                          a model by name, random weights
  granet export mine.py:network --to openvino                          what a function of yours returns"""


@dataclass(frozen=True)
class Arguments:
    """What to export, as what, compared on what."""

    source: tyro.conf.Positional[str]
    """Run directory, name of a model (`granet ls models`), timm:NAME, torchvision:NAME, module:function, or
    file.py:function."""
    to: Literal["onnx", "openvino", "pt2", "coreml", "state-dict"]
    """Format of the file."""
    output: Path | None = None
    """The file. If not given, it is called after the run and lies in its folder exports, or here for a named model."""
    precision: Literal["float32", "int8"] = "float32"
    """Precision of the file; int8 takes ranges from training images."""
    checkpoint: Literal["best", "last"] | None = None
    """Best by validation at target sparsity, or the last; the best if there is one, else the last, if not given."""
    images: int = 1000
    """Number of test images to compare on, spread evenly over the test set."""
    tolerance: float | None = None
    """Largest deviation allowed, as a share of the largest output; 1e-4 in float32, 0.25 in int8, if not given."""
    shrink: bool = False
    """Cut dead channels out first, and print what that leaves."""
    sparsity: float | None = None
    """Sparsity of a model by name, 0.9 if not given; a run, a function or a file keeps its own weights."""
    distribution: Literal["erk", "er", "uniform"] = "erk"
    """How a named model's sparsity is distributed over its layers."""
    size: int | None = None
    """Height and width of images; those of the model, or 32, if not given."""


def main(args: list[str]) -> int:
    """Writes the file and prints how it compares; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet export", description=DESCRIPTION)

    from granet.lab import exports

    say(exports.main(**vars(arguments)))
    return 0
