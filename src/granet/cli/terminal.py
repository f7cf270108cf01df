"""The way to the terminal: all that the commands say goes through here.

What they say holds names and messages out of files that may be anybody's. Characters that command a terminal are shown
instead of sent, and nothing is taken for markup. `Console` adds its own colours after that.
"""

import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from granet.text import printable


def say(*values: object, end: str = "\n") -> None:
    """Prints values as `print` does."""
    print(printable(" ".join(map(str, values))), end=end)


def warn(message: object) -> None:
    """Prints a warning to where errors go."""
    print(printable(f"granet: warning: {message}"), file=sys.stderr)


class Console(rich.console.Console):
    """A console of rich for foreign text."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Yields what is written, piece by piece."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
