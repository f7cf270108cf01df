import shutil
from pathlib import Path

import pytest

from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> list[Path]:
    """Two real runs, GraNet and its dense twin, of three epochs."""
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for method in ("granet", "dense"):
        values = recipes.load("digits", method=method).model_dump()
        values["train"]["epochs"], values["train"]["warmup"] = 3, "1ep"
        run = Run.for_recipe(validate(values, source="test"), folder)
        execute(run)
        paths.append(run.path)
    return paths


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy")
