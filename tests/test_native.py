"""The kernels compile once, are found again, and their absence is no error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from granet import native
from granet.native import EngineUnavailable


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr


def test_ready_never_compiles(tmp_path):
    code = "from granet import native; print(native.ready())"
    assert run(code, GRANET_CACHE=str(tmp_path))[:2] == (0, "False")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_explained(tmp_path):
    if native.ready() is False:
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "file").write_text("")
    code = "from granet import native; native.library()"
    status, _, err = run(code, GRANET_CACHE=str(tmp_path / "file" / "below"))
    assert status == 1
    assert "EngineUnavailable: the sparse kernels cannot be stored in" in err


def test_the_kernels_are_found_again():
    try:
        first = native.library()
    except EngineUnavailable:
        pytest.skip("no C++ compiler on this machine")
    changed = first.stat().st_mtime_ns
    assert native.library() == first
    assert first.stat().st_mtime_ns == changed


def test_select_pass_refuses_what_it_cannot_read():
    if not native.available():
        pytest.skip("no C++ compiler on this machine")
    scores, mask = torch.rand(10), torch.ones(10, dtype=torch.bool)
    for bad in [(scores.double(), mask, mask), (scores, mask[:5], mask), (scores[::2], mask[::2], mask[:5])]:
        with pytest.raises(RuntimeError, match="granet: select_pass takes"):
            torch.ops.granet.select_pass(bad[0], bad[1], False, 0.0, 1.0, bad[2].clone())


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("GRANET_CACHE", str(tmp_path))
    assert native.cache_dir() == tmp_path
    monkeypatch.delenv("GRANET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_dir() == tmp_path / "granet"


def test_the_library_needs_only_the_stable_interface():
    """No C++ symbol of libtorch: one compiled library serves every torch from 2.10 on."""
    found = subprocess.run(["nm", "-D", "--undefined-only", str(native.library())], capture_output=True, text=True)
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
from granet import native
try:
    native.load()
except native.EngineUnavailable as error:
    assert "broken" in str(error) and "out of luck" in str(error), error
else:
    raise SystemExit("no error")
assert not native.available()
"""
    environment = {**os.environ, "CXX": str(broken), "GRANET_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert not list(Path(tmp_path / "cache").glob("*.so"))
