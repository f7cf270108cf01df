"""Compiling granet's kernels with the C++ compiler at hand, once per machine, and loading them.

The sources travel with the package. The first use compiles them (some ten seconds) into a per-user cache folder whose
name is a hash of the sources, the flags, the compiler and torch's version, so that an upgrade of any of them compiles
anew. The headers are those of the installed torch; the library binds to its Stable ABI only.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

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


class EngineUnavailable(RuntimeError):  # noqa: N818 - a state of the machine, read as one
    """The native kernels cannot be had here; the message says why and what to do."""


def cache_dir() -> Path:
    """The folder that holds compiled engines: $GRANET_CACHE, else $XDG_CACHE_HOME/granet, else ~/.cache/granet."""
    named = os.environ.get("GRANET_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granet"


def compiler() -> str:
    """The path of the C++ compiler ($CXX, else g++, else c++). Raises EngineUnavailable if there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise EngineUnavailable(
        "no C++ compiler found, so sparse layers run on torch's dense kernels; "
        "install one (Debian, Ubuntu: apt install g++) to make them faster"
    )


def library(extra_flags: tuple[str, ...] = ()) -> Path:
    """The path of the compiled kernels, compiling them if this machine has not yet. Raises EngineUnavailable."""
    target = _target(cxx := compiler(), extra_flags)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                log.info("compiling the sparse kernels into %s (once, some ten seconds)", target)
                _compile(cxx, target, extra_flags)
    except OSError as error:
        raise EngineUnavailable(f"the sparse kernels cannot be stored in {target.parent}: {error}") from error
    return target


def _target(cxx: str, extra_flags: tuple[str, ...]) -> Path:
    """Where the kernels of this machine, compiler and torch are kept, compiled or not."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\0".join((*FLAGS, *extra_flags, version, torch.__version__, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return cache_dir() / f"engine-{digest.hexdigest()[:16]}.so"


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
        Path(linked).replace(target)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def load() -> None:
    """Loads the kernels into torch (torch.ops.granet), compiling them on first use. Raises EngineUnavailable."""
    torch.ops.load_library(str(library(_extra_flags())))


def _extra_flags() -> tuple[str, ...]:
    return tuple(os.environ.get("GRANET_CXXFLAGS", "").split())


@functools.cache
def ready() -> bool:
    """True where the kernels were compiled before and load now: for what is faster with them and right without.

    Unlike `available`, this never compiles. `python -m granet.native` does, for a whole machine.
    """
    try:
        if not _target(compiler(), _extra_flags()).exists():
            return False
        load()
    except (EngineUnavailable, OSError, subprocess.SubprocessError) as error:
        log.debug("the kernels are not used: %s", error)
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(not available())
