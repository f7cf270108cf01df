"""`granet info`."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """Tensors of a safetensors file: shapes, densities and bytes, against dense and the least possible.

The limit of a tensor is the entropy of a mask with as many entries at random places and of its values, whose signs and
fractions count as random.

examples:
  granet info small.safetensors                                          as granet.save writes it
  granet info runs/digits-granet-3f9a1c/checkpoints/00000320/model.safetensors
  granet info small.safetensors --json                                   for a program to read"""


@dataclass(frozen=True)
class Arguments:
    """Which file."""

    file: tyro.conf.Positional[Path]
    """Safetensors file, of granet or of others."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: list[str]) -> int:
    """Prints a table of a file's tensors; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet info", description=DESCRIPTION)

    from granet.storage.saving import opened
    from granet.storage.sizes import as_json, as_text, sizes

    with opened(arguments.file) as packed:
        found, total = sizes(packed), arguments.file.stat().st_size
        say(json.dumps(as_json(packed, found, total)) if arguments.json else as_text(packed, found, total))
    return 0
