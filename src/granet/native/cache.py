"""The folder of kernels that were compiled on this machine, and whether what lies there may be used.

The name of a library contains a hash of the sources, the flags, the compiler and torch's version, so that a change of
any of them compiles again. If there is no compiler, a library that another compiler made from the same sources is used.

Libraries in the cache are code that will run. They are used only if nobody but root and the user can have written them:
the folders and the files belong to root or the user, and nobody else can write to them. A digest beside each library
reveals damaged files.
"""

import functools
import hashlib
import logging
import os
import platform
import stat
from pathlib import Path

import torch

from granet import files
from granet.native.build import FLAGS, SOURCES, EngineUnavailable, ask, compile_library, compiler

log = logging.getLogger(__name__)


class CacheRefused(EngineUnavailable):
    """Other users can write to the folder or files of the compiled kernels."""


def cache_dir() -> Path:
    """Returns the folder of compiled kernels: $GRANET_CACHE, else $XDG_CACHE_HOME/granet, else ~/.cache/granet."""
    named = os.environ.get("GRANET_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granet"


def compiled(extra: tuple[str, ...] = ()) -> list[Path]:
    """Returns the libraries in the cache that can be used: those of this compiler, or of any other if there is none.

    Raises:
        EngineUnavailable: if the folder cannot be read, or if other users can write to it or to a library.
    """
    folder, stem = _folder(), _stem(extra)
    try:
        if not folder.exists():
            return []
        refuse_foreign(folder)
        try:
            names = [f"{stem}-{_version(compiler())}.so"]
        except EngineUnavailable:
            names = sorted(path.name for path in folder.glob(f"{stem}-*.so"))
        return [folder / name for name in names if intact(folder / name, check_owner=True)]
    except OSError as error:
        raise EngineUnavailable(f"the folder of the sparse kernels, {folder}, cannot be read: {error}") from error


def compile_into_cache(extra: tuple[str, ...] = (), unusable: Path | None = None) -> Path:
    """Returns the path of the kernels in the cache, after compiling them if they are not there.

    Args:
        extra: flags beside those of the package.
        unusable: a library that is there and cannot be loaded, so that it is compiled again.

    Raises:
        EngineUnavailable: if they cannot be compiled, or if other users can write to the folder or files.
    """
    cxx = compiler()
    target = _folder() / f"{_stem(extra)}-{_version(cxx)}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_foreign(target.parent)
        with files.locked(target.with_suffix(".lock")):
            if target == unusable or not intact(target, check_owner=True):
                log.info("compiling the sparse kernels into %s (once, in less than a minute)", target)
                compile_library(cxx, target, Path(torch.__file__).parent / "include", extra)
    except OSError as error:
        raise EngineUnavailable(f"the sparse kernels cannot be stored in {target.parent}: {error}") from error
    return target


def intact(library: Path, *, check_owner: bool) -> bool:
    """Returns whether a library exists and matches the digest beside it.

    Raises:
        CacheRefused: with ``check_owner``, if others can have written one of the two.
    """
    digest = library.with_suffix(".sha256")
    if not library.exists() or not digest.exists():
        return False
    for path in (library, digest) if check_owner else ():
        refuse_foreign(path)
    if digest.read_text(errors="replace").strip() == hashlib.sha256(library.read_bytes()).hexdigest():
        return True
    warn_once(f"the sparse kernels in {library} are damaged and are compiled again")
    return False


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, the first time in this process."""
    log.warning("%s", message)


def refuse_foreign(path: Path) -> None:
    """Raises CacheRefused if anyone but root and this user can change the file or folder ``path``.

    For a folder, the folders above it are looked at as well: who can rename one of them can put another in its place.
    """
    if not hasattr(os, "geteuid"):  # a system whose files have no such owners
        return
    advice = "Somebody else's code could run from there. Set GRANET_CACHE to another folder, or "
    if path.is_symlink():
        raise CacheRefused(f"the sparse kernels in {path} are not used: it is a symbolic link. {advice}remove it")
    for one in (path, *(path.parents if path.is_dir() else ())):
        status = one.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise CacheRefused(
                f"the sparse kernels in {path} are not used: {'it' if one == path else one} belongs to user "
                f"{status.st_uid}, not to you. {advice}remove {'it' if one == path else path}"
            )
        writable = status.st_mode & (stat.S_IWOTH if _is_private(status.st_gid) else stat.S_IWOTH | stat.S_IWGRP)
        # in a folder like /tmp, everybody can write, but only change their own files
        if writable and not (one != path and status.st_mode & stat.S_ISVTX):
            raise CacheRefused(
                f"the sparse kernels in {path} are not used: other users can write to {one}. {advice}chmod go-w {one}, "
                "after removing its contents"
            )


def _is_private(group: int) -> bool:
    """Returns whether a group is that of this user alone, as most systems make one for each user."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def _folder() -> Path:
    return cache_dir().resolve()


def _stem(extra: tuple[str, ...]) -> str:
    """Returns the part of the library's name that depends on the sources, flags, machine and torch."""
    digest = hashlib.sha256("\0".join((*FLAGS, *extra, torch.__version__, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"engine-{digest.hexdigest()[:16]}"


def _version(cxx: str) -> str:
    """Returns the part of the library's name that depends on the compiler. Raises EngineUnavailable."""
    return hashlib.sha256(ask(cxx, "--version").encode()).hexdigest()[:8]
