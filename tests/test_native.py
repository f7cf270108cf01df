"""The kernels compile once, are found again, and their absence is no error."""

import os
import shutil
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


def test_the_kernels_of_a_machine_are_compiled_by_the_package_itself(cache):
    """As the Makefile, the documentation and the errors say: here they are there already."""
    command = [sys.executable, "-m", "granet.native"]
    done = subprocess.run(command, env={**os.environ, "GRANET_CACHE": str(cache)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "GRANET_CACHE": str(cache.parent / "empty"), "CXX": "no-such-compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no-such-compiler cannot be found" in done.stderr


def test_a_cache_that_cannot_be_written_is_explained(tmp_path):
    try:
        native.compiler()
    except EngineUnavailable:
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
    broken = compiler_that_fails(tmp_path)
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
    environment = {**os.environ, "CXX": broken, "GRANET_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert not list(Path(tmp_path / "cache").glob("*.so"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache folder with the kernels of this machine; each test takes a copy."""
    try:
        library = native.library()
    except EngineUnavailable:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("cache")
    for path in (library, library.with_suffix(".sha256")):
        shutil.copy2(path, folder)
    return folder


@pytest.fixture
def cache(compiled, tmp_path):
    return Path(shutil.copytree(compiled, tmp_path / "cache"))


LOAD = """
import logging; logging.basicConfig()
import torch
from granet import native
print(native.ready(), native.available(), hasattr(torch.ops.granet, "select_pass"))
"""


def loaded(cache, **environment):
    """What `ready` and `available` say in a fresh process, whether the kernels are there, and what it wrote."""
    status, out, err = run(LOAD, GRANET_CACHE=str(cache), **environment)
    assert status == 0 and "Traceback" not in err, err
    return out, err


def test_a_folder_of_the_users_own_is_used(cache):
    assert loaded(cache)[0] == "True True True"


@pytest.mark.parametrize("who", ["folder", "library", "digest"])
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_kernels_that_others_can_have_written_are_refused(cache, who, how):
    """The name of a library can be computed, so one that somebody else has put there would be run."""
    (library,) = cache.glob("*.so")
    path = {"folder": cache, "library": library, "digest": library.with_suffix(".sha256")}[who]
    if how == "mode":
        path.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        pytest.skip("only root can give a file to another user")
    out, err = loaded(cache)
    assert out == "False False False"
    assert (
        "are not used: " in err and ("belongs to user 12345" if how == "owner" else "other users can write to") in err
    )
    assert "GRANET_CACHE" in err


def test_a_link_to_another_library_and_a_folder_in_an_open_one_are_refused(cache, tmp_path):
    (library,) = cache.glob("*.so")
    library.rename(tmp_path / "planted.so")
    library.symlink_to(tmp_path / "planted.so")
    assert "it is a symbolic link" in loaded(cache)[1]
    library.unlink()
    (tmp_path / "planted.so").rename(library)
    tmp_path.chmod(0o777)
    assert f"other users can write to {tmp_path}" in loaded(cache)[1]
    tmp_path.chmod(0o1777)  # as /tmp
    assert loaded(cache)[0] == "True True True"


def test_a_new_folder_belongs_to_the_user_alone(tmp_path):
    folder = tmp_path / "new" / "cache"
    broken = compiler_that_fails(tmp_path)
    assert "out of luck" in loaded(folder, CXX=broken)[1]
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("left", [0, 5000])
def test_a_damaged_library_is_not_loaded(cache, left):
    """Loading one that is cut off ends in SIGBUS."""
    (library,) = cache.glob("*.so")
    library.write_bytes(library.read_bytes()[:left])
    status, out, _ = run("from granet import native; print(native.ready())", GRANET_CACHE=str(cache))
    assert (status, out) == (0, "False")


@pytest.mark.slow
def test_a_damaged_library_is_compiled_anew(cache):
    (library,) = cache.glob("*.so")
    library.write_bytes(b"")
    out, err = loaded(cache)
    assert out == "False True True" and "is damaged and is compiled again" in err
    assert loaded(cache)[0] == "True True True"


def test_compiled_kernels_need_no_compiler(cache, tmp_path):
    assert loaded(cache, PATH=str(tmp_path), CXX="")[0] == "True True True"
    assert loaded(cache, CXX="/bin/false")[0] == "True True True"


def test_a_cxx_that_is_no_compiler_is_said(tmp_path):
    for name, why in (("/bin/false", "is not a C++ compiler"), ("no-such-compiler", "cannot be found")):
        out, err = loaded(tmp_path / "empty", CXX=name)
        assert out == "False False False" and why in err and name in err
    status, _, err = run(
        "from granet import native; native.load()", CXX="/bin/false", GRANET_CACHE=str(tmp_path / "empty")
    )
    assert status == 1 and "EngineUnavailable: /bin/false is not a C++ compiler" in err


def test_an_unknown_or_unsupported_instruction_set_is_refused_with_the_choices(cache):
    assert loaded(cache, GRANET_ISA="generic")[0] == "True True True"
    out, err = loaded(cache, GRANET_ISA="avx1024")
    assert out == "False False False" and "GRANET_ISA=avx1024 must be one of generic, avx2, avxvnni, avx512" in err
    if " avx512bw " not in Path("/proc/cpuinfo").read_text():
        assert "this processor cannot run it" in loaded(cache, GRANET_ISA="avx512")[1]


def compiler_that_fails(folder):
    """The path of a program that knows its version and cannot compile."""
    broken = folder / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    return str(broken)
