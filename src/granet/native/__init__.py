"""granet's kernels as a library that torch loads: the one that the package brings, or one compiled on this machine.

A wheel for a certain kind of machine contains the kernels ready to use. Elsewhere they are compiled at the first use
(in less than a minute) into a cache folder of the user, by `build`, and `cache` decides what may be loaded from there.
A library that cannot be loaded is named once in the log, and compiled again.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from granet.native.build import FLAGS, ISA_FLAGS, SOURCES, EngineUnavailable, compiler
from granet.native.cache import CacheRefused, cache_dir, compile_into_cache, compiled, intact, warn_once

__all__ = [
    "FLAGS",
    "ISA_FLAGS",
    "REDUCED",
    "SOURCES",
    "WIDTHS",
    "CacheRefused",
    "EngineUnavailable",
    "available",
    "cache_dir",
    "compile_into_cache",
    "compiler",
    "library",
    "load",
    "ready",
]

log = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / "engine.so"  # only in wheels for a kind of machine: hatch_build.py puts it there
# Floats in a vector of what GRANET_ISA may name, in the order of the tables in reduced.cpp. The float32 kernels exist
# for the widths only; those at reduced precision for each name.
WIDTHS = {"generic": 4, "avx2": 8, "avxvnni": 8, "avx512": 16, "avx512vnni": 16, "avx512bf16": 16}
REDUCED = tuple(WIDTHS)


def library(extra: tuple[str, ...] = ()) -> Path:
    """Returns the path of the compiled kernels, after compiling them if necessary.

    Raises:
        EngineUnavailable: if they cannot be compiled, or if other users can write to the folder or files.
    """
    return next(_found(extra), None) or compile_into_cache(extra)


def _found(extra: tuple[str, ...]) -> Iterator[Path]:
    """Yields the libraries that are there already: the package's own (for its own flags), then those in the cache."""
    if not extra and intact(PACKAGED, check_owner=False):
        yield PACKAGED
    yield from compiled(extra)


@functools.cache
def _loads(library: Path) -> bool:
    """Loads a library; returns False if it cannot be loaded, after saying why."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        warn_once(f"the sparse kernels in {library} cannot be loaded and are compiled again: {_reason(error)}")
        return False
    return True


def _reason(error: OSError) -> BaseException:
    return error.__cause__ or error  # torch's own message names the file alone


def _load(*, may_compile: bool) -> bool:
    """Loads the kernels; returns False if they would have to be compiled and may not. Raises EngineUnavailable."""
    forced, extra = os.environ.get("GRANET_ISA"), _extra_flags()
    if forced and forced not in WIDTHS:
        raise EngineUnavailable(f"GRANET_ISA={forced} must be one of {', '.join(WIDTHS)}, or unset")
    unusable = None
    for path in _found(extra):
        if _loads(path):
            break
        unusable = path
    else:
        if not may_compile:
            return False
        path = compile_into_cache(extra, unusable)
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise EngineUnavailable(f"the sparse kernels in {path} cannot be loaded: {_reason(error)}") from error
    if forced and REDUCED[torch.ops.granet.reduced_cpu()[0]] != forced:
        others = [name for name in WIDTHS if name != forced]
        raise EngineUnavailable(
            f"GRANET_ISA={forced}: this processor cannot run it; choose {' or '.join(others)}, or unset it"
        )
    return True


@functools.cache
def load() -> None:
    """Loads the kernels into torch (torch.ops.granet), compiling them on first use. Raises EngineUnavailable."""
    _load(may_compile=True)


def _extra_flags() -> tuple[str, ...]:
    return tuple(os.environ.get("GRANET_CXXFLAGS", "").split())


@functools.cache
def ready() -> bool:
    """Returns whether the kernels are compiled already and can be loaded.

    It is for code that is faster with the kernels and correct without them. Unlike `available`, it never compiles;
    `python -m granet.native` compiles them in advance.
    """
    try:
        return _load(may_compile=False)
    except EngineUnavailable as error:
        log.log(logging.WARNING if isinstance(error, CacheRefused) else logging.DEBUG, "%s", error)
        return False


@functools.cache
def available() -> bool:
    """Returns whether the native kernels can be loaded, compiling them if needed. If not, logs the reason once."""
    try:
        load()
    except EngineUnavailable as error:
        log.warning("%s", error)
        return False
    return True
