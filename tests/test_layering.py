"""Imports point one way, methods stand alone, and nothing heavy is imported for the command line's help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "granet"
LAYERS = [  # a folder or module may import what stands before it; docs/architecture.md draws them
    "names",
    "text",
    "registry",
    "parsing",
    "files",
    "functional",
    "schedule",
    "distribution",
    "criterion",
    "native",
    "shards",
    "ranks",
    "ranking",
    "topology",
    "bipartite",
    "methods",
    "pattern",
    "checks",
    "filters",
    "storages",
    "selection",
    "importers",
    "probe",
    "sparsifier",
    "integrations",
    "engine",
    "storage",
    "flops",
    "shrinking",
    "pruning",
    "export",
    "train",
    "hub",
    "report",
    "lab",
    "cli",
    "__main__",
]


def modules():
    """Dotted names (below granet) of all modules with their files; a folder stands for its `__init__`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, path


MODULES = dict(modules())


def imports(path):
    """The names of granet's modules that a file imports, at the top, in a function, or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "granet":
            below = node.module.split(".")[1:]
            for alias in node.names:
                name = ".".join([*below, alias.name])
                found.add(name if name in MODULES else ".".join(below))
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("granet.") for name in node.names if name.name.startswith("granet.")}
    return found & MODULES.keys()


def circles(edges):
    """The sets of modules that import one another, directly or through others (Tarjan's algorithm)."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(name):
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in edges[name]:
            if other not in number:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(set(members))

    for name in edges:
        if name not in number:
            visit(name)
    return found


def test_every_module_has_its_place():
    assert {name.split(".")[0] for name in MODULES} == set(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    own = name.split(".")[0]
    others = {other.split(".")[0] for other in imports(MODULES[name])} - {own}
    assert {other for other in others if LAYERS.index(other) > LAYERS.index(own)} == set()


def test_nothing_imports_in_a_circle():
    found = circles({name: imports(path) - {name} for name, path in MODULES.items()})
    assert found == []


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


@pytest.mark.parametrize(
    "module", ["granet", "granet.methods", "granet.train.registration", "granet.train.recipe", "granet.cli"]
)
def test_no_torch_before_it_is_needed(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_imports_have_no_effect(tmp_path):
    """Nothing is written, no seed is set, no thread count changed, no default dtype."""
    code = """
import torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import granet.sparsifier, granet.train.trainer, granet.train.models, granet.train.data, granet.flops
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_module_has_a_test():
    """Tests mirror the package: `train/run.py` is tested by `tests/train/test_run.py`."""
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    covered = {
        "__main__": "native",
        "base": "every_method",
        "recipes": "recipe",
        "records": "core",
        "sparse_storage": "storage",
        "optimizer": "trainer",
        "sections": "recipe",
        "images": "trainer",
        "catalog": "plugins",
        "registration": "plugins",
        "checks": "first_mistakes",
        "filters": "selection",
        "adapter": "lightning",
        "walk": "shrink",
        "cutting": "shrink",
        "magnitude": "methods",
        "wanda": "methods",
        "sparsegpt": "methods",
    }
    folders = ("methods", "cli", "engine", "lab", "hub")
    missing = {name for name in MODULES if (last := name.split(".")[-1]) and covered.get(last, last) not in tests}
    assert {name for name in missing if name.split(".")[0] not in folders and not (PACKAGE / name).is_dir()} == set()
    assert all(list((ROOT / "tests" / folder).rglob("test_*.py")) for folder in folders)
