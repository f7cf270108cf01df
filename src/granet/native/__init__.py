"""Compilation of granet's kernels with the machine's C++ compiler, once per machine, and loading of the result.

The package contains the sources. At the first use they are compiled (in about ten seconds) into a cache folder of the
user. The name of the library contains a hash of the sources, the flags, the compiler and torch's version, so that a
change of any of them compiles again. If there is no compiler, a library that another compiler made from the same
sources is used. The headers are those of the installed torch; the library uses only torch's Stable ABI.

Libraries in the cache are code that will run. They are used only if nobody but root and the user can have written them:
the folder and the files belong to root or the user, and nobody else can write to them. A digest beside each library
reveals damaged files.
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
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", *_AVX2, "-mprefer-vector-width=512")
ISA_FLAGS = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "reduced_avx2.cpp": _AVX2,
    "reduced_avxvnni.cpp": (*_AVX2, "-mavxvnni"),
    "reduced_avx512.cpp": _AVX512,
    "reduced_avx512vnni.cpp": (*_AVX512, "-mavx512vnni"),
    "reduced_avx512bf16.cpp": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}
# Floats in a vector of what GRANET_ISA may name, in the order of the tables in reduced.cpp. The float32 kernels exist
# for the widths only; those at reduced precision for each name.
WIDTHS = {"generic": 4, "avx2": 8, "avxvnni": 8, "avx512": 16, "avx512vnni": 16, "avx512bf16": 16}
REDUCED = tuple(WIDTHS)


class EngineUnavailable(RuntimeError):  # noqa: N818 - the name describes a state of the machine
    """The native kernels cannot be used on this machine. The message says why, and what to do."""


class CacheRefused(EngineUnavailable):
    """Other users can write to the folder or files of the compiled kernels."""


def cache_dir() -> Path:
    """Returns the folder of compiled kernels: $GRANET_CACHE, else $XDG_CACHE_HOME/granet, else ~/.cache/granet."""
    named = os.environ.get("GRANET_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granet"


def compiler() -> str:
    """Returns the path of the C++ compiler ($CXX, else g++, else c++). Raises EngineUnavailable if there is none."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        path = shutil.which(name)
        if path:
            return path
    if named:
        raise EngineUnavailable(
            f"CXX={named} cannot be found: set CXX to a C++ compiler, or unset it to use g++ or c++"
        )
    raise EngineUnavailable(
        "no C++ compiler found, so sparse layers run on torch's dense kernels; "
        "install one (Debian, Ubuntu: apt install g++) to make them faster"
    )


def library(extra_flags: tuple[str, ...] = ()) -> Path:
    """Returns the path of the compiled kernels, after compiling them if necessary.

    Raises:
        EngineUnavailable: if they cannot be compiled, or if other users can write to the folder or files.
    """
    compiled = _compiled(extra_flags)
    if compiled is not None:
        return compiled
    cxx = compiler()
    target = _folder() / f"{_stem(extra_flags)}-{_version(cxx)}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_foreign(target.parent)
        with files.locked(target.with_suffix(".lock")):
            if not _is_intact(target):
                log.info("compiling the sparse kernels into %s (once, about ten seconds)", target)
                _compile(cxx, target, extra_flags)
    except OSError as error:
        raise EngineUnavailable(f"the sparse kernels cannot be stored in {target.parent}: {error}") from error
    return target


def _folder() -> Path:
    return cache_dir().resolve()


def _compiled(extra_flags: tuple[str, ...]) -> Path | None:
    """Returns the compiled kernels in the cache: those of this compiler, or of any other if there is none here."""
    folder, stem = _folder(), _stem(extra_flags)
    try:
        if not folder.exists():
            return None
        _refuse_foreign(folder)
        try:
            names = [f"{stem}-{_version(compiler())}.so"]
        except EngineUnavailable:
            names = sorted(path.name for path in folder.glob(f"{stem}-*.so"))
        return next((folder / name for name in names if _is_intact(folder / name)), None)
    except OSError as error:
        raise EngineUnavailable(f"the folder of the sparse kernels, {folder}, cannot be read: {error}") from error


def _refuse_foreign(path: Path) -> None:
    """Raises CacheRefused if anyone but root and this user can change the file or folder `path`."""
    users = {0, os.geteuid()} if hasattr(os, "geteuid") else None
    if users is None:  # a system whose files have no such owners
        return
    status = path.lstat()
    advice = "Somebody else's code could run from there. Set GRANET_CACHE to another folder, or "
    if status.st_uid not in users:
        raise CacheRefused(
            f"the sparse kernels in {path} are not used: it belongs to user {status.st_uid}, not to you. "
            f"{advice}remove it"
        )
    if stat.S_ISLNK(status.st_mode):
        raise CacheRefused(f"the sparse kernels in {path} are not used: it is a symbolic link. {advice}remove it")
    for one in (path, *(path.parents if path.is_dir() else ())):
        mode = one.stat().st_mode
        sticky = (
            one != path and mode & stat.S_ISVTX
        )  # like /tmp: everybody can write there, but only change their own files
        if mode & 0o022 and not sticky:
            raise CacheRefused(
                f"the sparse kernels in {path} are not used: other users can write to {one}. {advice}chmod go-w {one}, "
                "after removing its contents"
            )


def _is_intact(target: Path) -> bool:
    """Returns whether the library exists and matches the digest beside it. Raises CacheRefused."""
    digest = target.with_suffix(".sha256")
    if not target.exists() or not digest.exists():
        return False
    for path in (target, digest):
        _refuse_foreign(path)
    if digest.read_text(errors="replace").strip() == hashlib.sha256(target.read_bytes()).hexdigest():
        return True
    log.warning("%s is damaged and is compiled again", target)
    return False


def _stem(extra_flags: tuple[str, ...]) -> str:
    """Returns the part of the library's name that depends on the sources, flags, machine and torch."""
    digest = hashlib.sha256("\0".join((*FLAGS, *extra_flags, torch.__version__, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"engine-{digest.hexdigest()[:16]}"


def _version(cxx: str) -> str:
    """Returns the part of the library's name that depends on the compiler. Raises EngineUnavailable."""
    try:
        done = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EngineUnavailable(f"the C++ compiler {cxx} cannot be run: {error}") from error
    if done.returncode:
        raise EngineUnavailable(
            f"{cxx} is not a C++ compiler: {cxx} --version ends with status {done.returncode}. "
            "Set CXX to one, or unset it to use g++ or c++"
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
            compiled = f"{folder}/{source.stem}.o"
            run(*FLAGS, *extra_flags, *ISA_FLAGS.get(source.name, ()), *includes, "-c", str(source), "-o", compiled)
            return compiled

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
        raise EngineUnavailable(f"GRANET_ISA={forced} must be one of {', '.join(WIDTHS)}, or unset")
    path = library(_extra_flags())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise EngineUnavailable(
            f"the sparse kernels in {path} cannot be loaded: {error}. Remove the file to compile them again"
        ) from error
    if forced and REDUCED[torch.ops.granet.reduced_cpu()[0]] != forced:
        others = [name for name in WIDTHS if name != forced]
        raise EngineUnavailable(
            f"GRANET_ISA={forced}: this processor cannot run it; choose {' or '.join(others)}, or unset it"
        )


def _extra_flags() -> tuple[str, ...]:
    return tuple(os.environ.get("GRANET_CXXFLAGS", "").split())


@functools.cache
def ready() -> bool:
    """Returns whether the kernels are compiled already and can be loaded.

    It is for code that is faster with the kernels and correct without them. Unlike `available`, it never compiles;
    `python -m granet.native` compiles them in advance.
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
    """Returns whether the native kernels can be loaded, compiling them if needed. If not, logs the reason once."""
    try:
        load()
    except EngineUnavailable as error:
        log.warning("%s", error)
        return False
    return True
