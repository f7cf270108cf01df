"""`granet share`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from granet.cli import words
from granet.cli.terminal import say

DESCRIPTION = """A run's network to share: a small file of weights, its configuration and recipe, and a model card with
accuracy, sparsity and cost. Look at the card before you publish it.

examples:
  granet share runs/digits-granet-3f9a1c shared                          a folder that others can load
  granet share runs/digits-granet-3f9a1c shared --push user/digits       and the same on the Hugging Face Hub"""


@dataclass(frozen=True)
class Arguments:
    """Which network, and where it goes."""

    run: tyro.conf.Positional[Path]
    """Run directory of a finished run."""
    folder: tyro.conf.Positional[Path]
    """Folder to write; made if it is not there."""
    checkpoint: Literal["best", "last"] | None = None
    """Best by validation at target sparsity, or the last; the best if there is one, else the last, if not given."""
    push: str | None = None
    """Repository on the Hugging Face Hub, as user/name, that the folder is uploaded to; needs `hf auth login`."""
    private: bool = False
    """Make that repository private."""


def main(args: list[str]) -> int:
    """Writes the folder, uploads it if asked; returns the exit code."""
    arguments = words.read(Arguments, args, prog="granet share", description=DESCRIPTION)
    if arguments.private and arguments.push is None:
        raise ValueError("--private is about the repository of --push: give --push user/name too")

    from granet.hub import Network

    network = Network.from_run(arguments.run, arguments.checkpoint)
    network.save_pretrained(arguments.folder)
    rows = sorted((path.stat().st_size, path.name) for path in arguments.folder.iterdir() if path.is_file())
    say(f"{arguments.folder}: " + ", ".join(f"{name} ({size:,} bytes)" for size, name in reversed(rows)))
    say(f'load it by granet.hub.Network.from_pretrained("{arguments.folder}")')
    if arguments.push is not None:
        say(f"uploaded: {network.push_to_hub(arguments.push, private=arguments.private)}")
    return 0
