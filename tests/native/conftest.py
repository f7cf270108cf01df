import shutil
import sys
from pathlib import Path

import pytest

from granet import native

sys.path.append(str(Path(__file__).parent))  # processes


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A cache folder with the kernels of this machine; each test takes a copy."""
    try:
        library = native.compile_into_cache()
    except native.EngineUnavailable:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("compiled")
    for path in (library, library.with_suffix(".sha256")):
        shutil.copy2(path, folder)
    return folder


@pytest.fixture
def cache(compiled, tmp_path):
    return Path(shutil.copytree(compiled, tmp_path / "cache"))
