import os
import subprocess
import sys
from pathlib import Path

import pytest

from granet.engine import build


def test_the_library_is_compiled_once():
    first = build.library()
    stamp = first.stat().st_mtime_ns
    assert build.library() == first
    assert first.stat().st_mtime_ns == stamp


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("GRANET_CACHE", str(tmp_path))
    assert build.cache_dir() == tmp_path
    monkeypatch.delenv("GRANET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "granet"


def test_the_library_needs_only_the_stable_interface():
    """No C++ symbol of libtorch: one compiled library serves every torch from 2.10 on."""
    found = subprocess.run(["nm", "-D", "--undefined-only", str(build.library())], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no nm on this machine")
    symbols = [line.split()[-1] for line in found.stdout.splitlines()]
    foreign = [s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10"))]
    assert not foreign
    assert any(s.startswith("aoti_torch_") for s in symbols)


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    program = """
from granet.engine import build
try:
    build.load()
except build.EngineUnavailable as error:
    assert "broken" in str(error) and "out of luck" in str(error), error
else:
    raise SystemExit("no error")
assert not build.available()
"""
    environment = {**os.environ, "CXX": str(broken), "GRANET_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert not list(Path(tmp_path / "cache").glob("*.so"))
