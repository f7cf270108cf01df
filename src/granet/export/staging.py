"""Files of an export: written in a folder beside their place, moved there when they have passed the comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from granet import files


def checked_path(path: str | Path, suffix: str) -> Path:
    """Returns where an export is to be written.

    Raises:
        ValueError: its name does not end with `suffix`.
        FileNotFoundError: its folder does not exist.
        files.FileError: a folder has its name.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{path}: the file's name must end with {suffix}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise files.FileError(f"{path} is a folder already: move it away, or give another name")
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Gives a path of the same name in a new folder; what lies there at the end is moved beside `path`.

    After an error nothing is moved, and what was there before stays.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".granet-export-") as folder:
        yield Path(folder) / path.name
        for made in sorted(Path(folder).iterdir()):  # the .bin of a pair before its .xml
            made.replace(path.with_name(made.name))


def size(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    inside = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in inside if one.is_file())
