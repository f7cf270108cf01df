"""Compiling granet's kernels with the C++ compiler at hand, once per machine, and loading them.

The sources travel with the package. The first use compiles them (some ten seconds) into a per-user cache folder whose
name is a hash of the sources, the flags, the compiler and torch's version, so that an upgrade of any of them compiles
anew. Where no compiler is at hand, kernels that any compiler made from the same sources are used. The headers are those
of the installed torch; the library binds to its Stable ABI only.

What lies in the cache is run, so it is used only where nobody but root and the user can have written it: folder and
files belong to one of them and are writable by nobody else. A digest beside each library tells a damaged one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from granet import files

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=gnu++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# The instruction set is a property of one file each; everything else is compiled for any machine of the architecture.
ISA_FLAGS = {
    "kernels_avx2.cpp": ("-mavx2", "-mfma"),
    "kernels_avx512.cpp": (
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mprefer-vector-width=512",
    ),
}
WIDTHS = {"generic": 4, "avx2": 8, "avx512": 16}  # floats in a vector of what GRANET_ISA may name


class EngineUnavailable(RuntimeError):  # noqa: N818 - a state of the machine, read as one
    """The native kernels cannot be had here; the message says why and what to do."""


class CacheRefused(EngineUnavailable):
    """Others can write where the kernels are kept."""


def cache_dir() -> Path:
    """The folder that holds compiled engines: $GRANET_CACHE, else $XDG_CACHE_HOME/granet, else ~/.cache/granet."""
    named = os.environ.get("GRANET_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granet"


def compiler() -> str:
    """The path of the C++ compiler ($CXX, else g++, else c++). Raises EngineUnavailable if there is none."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    if named:
        raise EngineUnavailable(
            f"CXX={named} is no program that can be found: name a C++ compiler, or unset it to use g++ or c++"
        )
    raise EngineUnavailable(
        "no C++ compiler found, so sparse layers run on torch's dense kernels; "
        "install one (Debian, Ubuntu: apt install g++) to make them faster"
    )


def library(extra_flags: tuple[str, ...] = ()) -> Path:
    """The path of the compiled kernels, compiling them if this machine has not yet.

    Raises:
        EngineUnavailable: there are none and they cannot be compiled, or others can write where they are kept.
    """
    found = _compiled(extra_flags)
    if found is not None:
        return found
    cxx = compiler()
    target = _folder() / f"{_stem(extra_flags)}-{_version(cxx)}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_foreign(target.parent)
        with files.locked(target.with_suffix(".lock")):
            if not _is_whole(target):
                log.info("compiling the sparse kernels into %s (once, some ten seconds)", target)
                _compile(cxx, target, extra_flags)
    except OSError as error:
        raise EngineUnavailable(f"the sparse kernels cannot be stored in {target.parent}: {error}") from error
    return target


def _folder() -> Path:
    return cache_dir().resolve()


def _compiled(extra_flags: tuple[str, ...]) -> Path | None:
    """The kernels that lie compiled in the cache: this compiler's, or any other's where no compiler is at hand."""
    folder, stem = _folder(), _stem(extra_flags)
    try:
        if not folder.exists():
            return None
        _refuse_foreign(folder)
        try:
            names = [f"{stem}-{_version(compiler())}.so"]
        except EngineUnavailable:
            names = sorted(path.name for path in folder.glob(f"{stem}-*.so"))
        return next((folder / name for name in names if _is_whole(folder / name)), None)
    except OSError as error:
        raise EngineUnavailable(f"the sparse kernels cannot be looked for in {folder}: {error}") from error


def _refuse_foreign(path: Path) -> None:
    """Raises CacheRefused where another user than root and this one can change the file or folder `path`."""
    users = {0, os.geteuid()} if hasattr(os, "geteuid") else None
    if users is None:  # a system without owners of this kind
        return
    found = path.lstat()
    advice = "Code of others could be run from there. Name another folder by GRANET_CACHE, or "
    if found.st_uid not in users:
        raise CacheRefused(
            f"the sparse kernels in {path} are not used: it belongs to user {found.st_uid}, not to you. "
            f"{advice}remove it"
        )
    if stat.S_ISLNK(found.st_mode):
        raise CacheRefused(f"the sparse kernels in {path} are not used: it is a symbolic link. {advice}remove it")
    for one in (path, *(path.parents if path.is_dir() else ())):
        mode = one.stat().st_mode
        sticky = one != path and mode & stat.S_ISVTX  # as /tmp: everybody writes there, and only to what is his own
        if mode & 0o022 and not sticky:
            raise CacheRefused(
                f"the sparse kernels in {path} are not used: other users can write to {one}. {advice}chmod go-w {one}, "
                "after removing what is in it"
            )


def _is_whole(target: Path) -> bool:
    """Whether the kernels are there as they were compiled, by the digest beside them. Raises CacheRefused."""
    digest = target.with_suffix(".sha256")
    if not target.exists() or not digest.exists():
        return False
    for path in (target, digest):
        _refuse_foreign(path)
    if digest.read_text(errors="replace").strip() == hashlib.sha256(target.read_bytes()).hexdigest():
        return True
    log.warning("%s is damaged: it is compiled anew", target)
    return False


def _stem(extra_flags: tuple[str, ...]) -> str:
    """What names the kernels of these sources, flags, machine and torch, whichever compiler makes them."""
    digest = hashlib.sha256("\0".join((*FLAGS, *extra_flags, torch.__version__, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"engine-{digest.hexdigest()[:16]}"


def _version(cxx: str) -> str:
    """What names the compiler. Raises EngineUnavailable if it cannot be run."""
    try:
        done = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EngineUnavailable(f"the C++ compiler {cxx} cannot be run: {error}") from error
    if done.returncode:
        raise EngineUnavailable(
            f"{cxx} is no C++ compiler: {cxx} --version ends with status {done.returncode}. "
            "Name one by CXX, or unset it to use g++ or c++"
        )
    return hashlib.sha256(done.stdout.encode()).hexdigest()[:8]


def _compile(cxx: str, target: Path, extra_flags: tuple[str, ...]) -> None:
    includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{SOURCES}"]
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def run(*arguments: str) -> None:
            done = subprocess.run([cxx, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                raise EngineUnavailable(f"the sparse kernels do not compile with {cxx}: {done.stderr[-2000:]}")

        def compile_one(source: Path) -> str:
            made = f"{folder}/{source.stem}.o"
            run(*FLAGS, *extra_flags, *ISA_FLAGS.get(source.name, ()), *includes, "-c", str(source), "-o", made)
            return made

        sources = [s for s in sorted(SOURCES.glob("*.cpp")) if _is_x86() or s.name not in ISA_FLAGS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = f"{folder}/engine.so"
        run("-shared", *extra_flags, *objects, f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-o", linked)
        Path(linked).chmod(0o700)
        digest = Path(f"{folder}/digest")
        digest.write_text(hashlib.sha256(Path(linked).read_bytes()).hexdigest() + "\n")
        Path(linked).replace(target)
        digest.replace(target.with_suffix(".sha256"))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def load() -> None:
    """Loads the kernels into torch (torch.ops.granet), compiling them on first use. Raises EngineUnavailable."""
    forced = os.environ.get("GRANET_ISA")
    if forced and forced not in WIDTHS:
        raise EngineUnavailable(f"GRANET_ISA={forced} is none of {', '.join(WIDTHS)}")
    path = library(_extra_flags())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise EngineUnavailable(f"the sparse kernels in {path} cannot be loaded: {error}. Remove that file") from error
    if forced and torch.ops.granet.cpu()[0] != WIDTHS[forced]:
        known = [name for name, width in WIDTHS.items() if width != WIDTHS[forced]]
        raise EngineUnavailable(
            f"GRANET_ISA={forced}: this processor cannot run it; choose another of {', '.join(known)}, or unset it"
        )


def _extra_flags() -> tuple[str, ...]:
    return tuple(os.environ.get("GRANET_CXXFLAGS", "").split())


@functools.cache
def ready() -> bool:
    """True where the kernels were compiled before and load now: for what is faster with them and right without.

    Unlike `available`, this never compiles. `python -m granet.native` does, for a whole machine.
    """
    try:
        if _compiled(_extra_flags()) is None:
            return False
        load()
    except EngineUnavailable as error:
        log.log(logging.WARNING if isinstance(error, CacheRefused) else logging.DEBUG, "%s", error)
        return False
    return True


@functools.cache
def available() -> bool:
    """True where the native kernels load; otherwise says why, once, through the module's logger."""
    try:
        load()
    except EngineUnavailable as error:
        log.warning("%s", error)
        return False
    return True
