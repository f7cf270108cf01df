"""What compilers are asked, and which sources each of them gets."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from granet.native import EngineUnavailable
from granet.native.build import ISA_FLAGS, architecture, compile_library, compiler, sources

HEADERS = Path(torch.__file__).parent / "include"


def symbols(library):
    """The versions of the system's libraries that a library needs, as {"GLIBC": (2, 16), ...}: the newest of each."""
    listed = subprocess.run(["readelf", "-V", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", listed)
    return {name: max(tuple(map(int, v.split("."))) for n, v in found if n == name) for name in {n for n, _ in found}}


def test_the_processor_of_a_compiler(tmp_path, monkeypatch):
    try:
        found = architecture(compiler())
    except EngineUnavailable:
        pytest.skip("no C++ compiler on this machine")
    assert found in ("x86_64", "aarch64")
    with pytest.raises(EngineUnavailable, match="/bin/false is not a C"):
        architecture("/bin/false")
    with pytest.raises(EngineUnavailable, match="/no/such/compiler cannot be run"):
        architecture("/no/such/compiler")


def test_other_processors_get_no_sources_with_instructions_of_x86():
    all_of_them = {path.name for path in sources("x86_64")}
    assert set(ISA_FLAGS) < all_of_them
    assert {path.name for path in sources("aarch64")} == all_of_them - set(ISA_FLAGS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_library_for_another_processor(tmp_path):
    """It is compiled and linked. docs/releasing.md says what else was tried with it, and how."""
    cross = shutil.which("aarch64-linux-gnu-g++")
    if cross is None:
        pytest.skip("needs a compiler for AArch64 (Debian: apt install g++-aarch64-linux-gnu)")
    assert architecture(cross) == "aarch64"
    library = tmp_path / "engine.so"
    compile_library(cross, library, HEADERS, portable=True)
    header = subprocess.run(["readelf", "-h", str(library)], capture_output=True, text=True, check=True).stdout
    assert "AArch64" in header
    needed = symbols(library)
    assert needed["GLIBC"] <= (2, 28) and needed["GLIBCXX"] <= (3, 4, 25) and needed["CXXABI"] <= (1, 3, 11)
