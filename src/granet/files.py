"""Files in folders that someone else may have prepared: every read and write of a run directory goes through here.

A run directory can come from anybody. Nothing in it is followed out of it: a symbolic link among its files and folders
is refused, a hard link is parted from the file elsewhere before it is written to, a pipe or a device is not opened.
Files are replaced as a whole, and only what granet wrote itself is ever deleted. The path of the run directory is the
user's own choice and may lead through any links.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_LINK = getattr(os, "O_NOFOLLOW", 0)
_FLAGS = _LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # a pipe must not keep us waiting


class FileError(OSError):
    """A file that is not what it ought to be: names it, says what it is, and what to do."""


def within(folder: Path, *names: str) -> Path:
    """Returns the path of ``names`` below ``folder``, whether there is anything or not.

    Raises:
        FileError: a part of the path below ``folder`` is a symbolic link.
    """
    path = folder
    for name in names:
        path = path / name
        if path.is_symlink():
            raise FileError(
                f"{path} is a symbolic link (to {path.readlink()}), and links inside a run directory are not "
                "followed: put the file or folder itself there, or remove the link"
            )
    return path


def subfolder(folder: Path, name: str) -> Path:
    """Returns the folder ``name`` in ``folder``, made if there is none.

    Raises:
        FileError: there is something else of that name: a link, or a file.
    """
    path = within(folder, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileError(f"{path} is no folder: move it away") from None
    return path


def read(path: Path) -> bytes:
    """Returns the content of a file.

    Raises:
        FileNotFoundError: there is none.
        FileError: it is a link, a folder, a pipe or a device.
    """
    with os.fdopen(_opened(path, os.O_RDONLY), "rb") as file:
        return file.read()


def tail(path: Path, size: int) -> bytes:
    """Returns the last bytes of a file, at most so many; errors as `read`."""
    with os.fdopen(_opened(path, os.O_RDONLY), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read(size)


def there(path: Path) -> bool:
    """Whether there is a file, a link or a folder of that name."""
    return os.path.lexists(path)


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk.

    Raises:
        FileExistsError: there is one.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file such that a reader sees the old content or the new, never a part.

    Where a link has that name, the file takes the place of the link.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Gives a new file to write to, which takes the place of `path` when the block ends without an error."""
    # a name that nobody can foresee: what was put there before is not written to
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def appending(path: Path) -> BinaryIO:
    """Returns a file opened for writing at its end, made if there is none; a write that fails says so at once.

    One that has other names too (hard links) is copied first, so that what these names stand for stays as it is.

    Raises:
        FileError: it is a link, a folder, a pipe or a device.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    descriptor = _opened(path, flags)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        replace(path, read(path))
        descriptor = _opened(path, flags)
    return os.fdopen(descriptor, "ab", buffering=0)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file, which is made if there is none and keeps its content.

    The system releases the lock when the process ends, however it ends. The package filelock would add little: the file
    is opened with the checks of all files here, which it does not make (its version 4.3 locks a pipe as well).

    Args:
        path: the file.
        wait: whether to wait while another process holds the lock.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        FileError: it is a link, a folder, a pipe or a device, or the system has no such locks.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        raise FileError(f"{path} cannot be locked: granet needs a system that has flock") from None
    descriptor = _opened(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove(folder: Path, names: Iterable[str]) -> bool:
    """Removes a folder that holds nothing but files of these names; returns whether it is gone.

    A folder with anything else in it, which granet did not write, is left as it is, and so is a link.
    """
    names = set(names)
    if not only_holds(folder, names):
        return False
    with contextlib.suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    return not there(folder)


def only_holds(folder: Path, names: Iterable[str]) -> bool:
    """Whether it is a folder, no link, and holds nothing but files of these names."""
    if folder.is_symlink():
        return False
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return False
    names = set(names)
    return all(entry.name in names and not entry.is_dir(follow_symlinks=False) for entry in entries)


def sync(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int) -> int:
    """Returns the descriptor of a plain file."""
    try:
        descriptor = os.open(path, flags | _FLAGS, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            within(path.parent, path.name)
        if error.errno in (errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise FileError(f"{path} is no plain file: move it away") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path} is no plain file: move it away")
    return descriptor
