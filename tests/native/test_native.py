"""The kernels that the package brings come first; what cannot be loaded is said once, replaced, and never fatal."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import compiler_that_remembers, loaded, run

import granet
from granet import native
from granet.native import EngineUnavailable


def test_the_kernels_of_a_machine_are_compiled_by_the_package_itself(cache):
    """As the Makefile, the documentation and the errors say: here they are there already."""
    command = [sys.executable, "-m", "granet.native"]
    done = subprocess.run(command, env={**os.environ, "GRANET_CACHE": str(cache)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "GRANET_CACHE": str(cache.parent / "empty"), "CXX": "no-such-compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no-such-compiler cannot be found" in done.stderr


def test_select_pass_refuses_what_it_cannot_read():
    if not native.available():
        pytest.skip("no C++ compiler on this machine")
    scores, mask = torch.rand(10), torch.ones(10, dtype=torch.bool)
    for bad in [(scores.double(), mask, mask), (scores, mask[:5], mask), (scores[::2], mask[::2], mask[:5])]:
        with pytest.raises(RuntimeError, match="granet: select_pass takes"):
            torch.ops.granet.select_pass(bad[0], bad[1], False, 0.0, 1.0, bad[2].clone())


def test_an_unknown_or_unsupported_instruction_set_is_refused_with_the_choices(cache):
    assert loaded(cache, GRANET_ISA="generic")[0] == "True True True"
    out, err = loaded(cache, GRANET_ISA="avx1024")
    assert out == "False False False" and "GRANET_ISA=avx1024 must be one of generic, avx2, avxvnni, avx512" in err
    if " avx512bw " not in Path("/proc/cpuinfo").read_text():
        assert "this processor cannot run it" in loaded(cache, GRANET_ISA="avx512")[1]


@pytest.fixture
def package(compiled, tmp_path):
    """A folder with the package as a wheel for this kind of machine installs it."""
    shutil.copytree(Path(granet.__file__).parent, tmp_path / "granet", ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = compiled.glob("*.so")
    put(tmp_path / "granet" / "native" / "engine.so", library.read_bytes())
    return tmp_path


def put(library, content):
    """Writes a library with the right digest, as if it had been made so."""
    library.write_bytes(content)
    library.chmod(0o700)
    library.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    library.with_suffix(".sha256").chmod(0o600)


def test_the_packages_own_kernels_need_neither_a_compiler_nor_a_cache(package):
    where = {"PYTHONPATH": str(package), "PATH": str(package), "CXX": ""}
    assert loaded(package / "cache", **where) == ("True True True", "")
    assert not (package / "cache").exists()


def test_flags_of_the_users_own_compile_the_sources(package, monkeypatch):
    monkeypatch.setattr(native, "PACKAGED", package / "granet" / "native" / "engine.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("GRANET_CACHE", str(package / "cache"))
    assert native.library() == native.PACKAGED
    with pytest.raises(EngineUnavailable, match="no-such-compiler cannot be found"):
        native.library(("-O1",))


def damage_cut_off(content, folder):
    return content[:70000], "are damaged"


def damage_other_processor(content, folder):
    """e_machine in the header of an ELF file: 183 is AArch64."""
    return content[:18] + (183).to_bytes(2, "little") + content[20:], "cannot be loaded"


def damage_missing_symbol(content, folder):
    """What happens below torch 2.10, or if the kernels need more than torch has."""
    source, library = folder / "missing.cpp", folder / "missing.so"
    source.write_text('extern "C" int nobody_has_this(); int answer = nobody_has_this();')
    subprocess.run([native.compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.read_bytes(), "undefined symbol: nobody_has_this"


DAMAGES = [damage_cut_off, damage_other_processor, damage_missing_symbol]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_of_the_package_that_cannot_be_loaded_is_said_once_and_replaced(package, compiled, damage):
    library = package / "granet" / "native" / "engine.so"
    content, why = damage(library.read_bytes(), package)
    put(library, content)
    if damage is damage_cut_off:
        library.with_suffix(".sha256").write_text("the digest of the library as it was")
    compiler = compiler_that_remembers(package, *compiled.glob("*.so"))
    out, err = loaded(package / "cache", PYTHONPATH=str(package), CXX=compiler)
    assert out == "False True True" and err.count("WARNING") == 1 and str(library) in err and why in err
    assert len(list((package / "cache").glob("*.so"))) == 1


def test_without_a_compiler_too_it_is_said_once(package):
    library = package / "granet" / "native" / "engine.so"
    put(library, damage_missing_symbol(None, package)[0])
    out, err = loaded(package / "cache", PYTHONPATH=str(package), CXX="no-such-compiler")
    assert out == "False False False"
    assert err.count("nobody_has_this") == err.count("no-such-compiler cannot be found") == 1


@pytest.mark.parametrize("damage", DAMAGES[1:])
def test_a_library_of_the_cache_that_cannot_be_loaded_is_compiled_again(cache, compiled, damage, tmp_path):
    (library,) = cache.glob("*.so")
    content, why = damage(library.read_bytes(), tmp_path)
    put(library, content)
    out, err = loaded(cache, CXX=compiler_that_remembers(tmp_path, compiled / library.name))
    assert out == "False True True" and err.count(why) == err.count("cannot be loaded") == 1
    assert library.read_bytes() == (compiled / library.name).read_bytes()


def test_what_was_compiled_and_cannot_be_loaded_is_an_error(tmp_path):
    """Not an endless loop of compiling."""
    (tmp_path / "nothing").write_text("no library")
    compiler = compiler_that_remembers(tmp_path, tmp_path / "nothing")
    code = "from granet import native; native.load()"
    status, _, err = run(code, CXX=compiler, GRANET_CACHE=str(tmp_path / "cache"))
    assert status == 1 and err.count("EngineUnavailable: the sparse kernels in") == 1 and "cannot be loaded" in err


def test_a_machine_without_kernels_is_said_once(tmp_path):
    code = """
import logging; logging.basicConfig()
import torch, granet
from granet import native
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
for _ in range(2):
    fast = granet.compile(model.eval(), torch.randn(1, 64))
    assert torch.allclose(fast(torch.ones(1, 64)), model(torch.ones(1, 64)))
"""
    status, _, err = run(code, CXX="no-such-compiler", GRANET_CACHE=str(tmp_path / "cache"))
    assert status == 0 and err.count("no-such-compiler cannot be found") == 1


def test_an_engine_that_is_unavailable_is_an_error_of_its_own():
    assert issubclass(native.CacheRefused, EngineUnavailable) and issubclass(EngineUnavailable, RuntimeError)
