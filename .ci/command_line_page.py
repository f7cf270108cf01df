"""Prints the documentation page of the command line: what `granet COMMAND --help` shows, for every command."""

import os
import subprocess
import sys

from granet.cli import COMMANDS


def shown(*arguments: str) -> str:
    """Returns what granet prints for these arguments on a terminal of 88 columns, without colours."""
    plain = os.environ | {"NO_COLOR": "1", "COLUMNS": "88"}
    done = subprocess.run([sys.executable, "-m", "granet.cli", *arguments], env=plain, capture_output=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.decode().splitlines())


print("# Command line\n\nThis is what `granet --help`, and `--help` after each command, prints.\n")
print(f"```text\n{shown('--help')}\n```")
for command in COMMANDS:
    print(f"\n## granet {command}\n\n```text\n{shown(command, '--help')}\n```")
