"""Imports point one way, methods stand alone, and nothing heavy is imported for the command line's help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "granet"
LAYERS = [  # a module may import what stands before it
    "names",
    "functional",
    "schedule",
    "distribution",
    "criterion",
    "native",
    "ranks",
    "distributed",
    "ranking",
    "topology",
    "pattern",
    "methods",
    "checks",
    "filters",
    "selection",
    "importers",
    "records",
    "quantised",
    "masking",
    "regrowth",
    "reparameterize",
    "probe",
    "state",
    "stepping",
    "attachment",
    "ownership",
    "followers",
    "upkeep",
    "sparsifier",
    "sharded",
    "integrations",
    "engine",
    "flops",
    "batches",
    "data",
    "models",
    "texts",
    "files",
    "summary",
    "problems",
    "recipe",
    "recipes",
    "checkpoint",
    "optimizer",
    "trainer",
    "charts",
    "comparison",
    "report",
    "run",
    "bench",
    "lab",
    "cli",
]


def imports(path):
    """The names of granet's modules that a file imports, at the top or in a function; those for types alone aside."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "granet":
            below = node.module.split(".")[1:]
            found |= {below[0]} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("granet.")}
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            yield name, path


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set(LAYERS)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: getattr(value, "stem", value))
def test_imports_point_one_way(name, path):
    upward = {other for other in imports(path) if other in LAYERS and LAYERS.index(other) > LAYERS.index(name)}
    assert not upward


def test_a_method_imports_no_method():
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.stem in ("__init__", "base"):
            continue
        tree = ast.parse(path.read_text())
        froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {m for m in froms if m.startswith("granet.methods")} - {"granet.methods.base"}, path


def test_no_file_is_longer_than_400_lines():
    """Longer ones would need a reason in their docstring."""
    assert {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400} == {}


@pytest.mark.parametrize("module", ["granet", "granet.methods", "granet.recipe", "granet.cli"])
def test_no_torch_before_it_is_needed(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_imports_have_no_effect(tmp_path):
    """Nothing is written, no seed is set, no thread count changed, no default dtype."""
    code = """
import torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import granet.sparsifier, granet.trainer, granet.models, granet.data, granet.flops
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_module_has_a_test():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    covered = {
        "methods": "every_method",
        "recipes": "recipe",
        "records": "sparsifier",
        "optimizer": "trainer",
        "checks": "first_mistakes",
        "filters": "selection",
    }
    folders = ("cli", "engine", "integrations", "lab")
    missing = {name for name, _ in modules() if covered.get(name, name) not in tests and name not in folders}
    assert not missing
    assert all(list((ROOT / "tests" / folder).glob("test_*.py")) for folder in folders)
