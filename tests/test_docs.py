"""What the documentation says of names, folders and versions is so."""

import dataclasses
import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import granet

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/*.md")])
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
NAME = re.compile(r"(?<![\w./-])granet(?:\.[A-Za-z_]\w*)+")
OPTIONAL = {"granet.integrations.lightning": "lightning", "granet.integrations.huggingface": "transformers"}
EARLIER = {"CHANGELOG.md", "LOG.md"}  # these speak of what things were called at their time, too


def code_names():
    """The dotted names below granet in the code of all pages, each with the page that has it."""
    found = {}
    for page in PAGES:
        if page.name in EARLIER:
            continue
        for code in CODE.findall(page.read_text()):
            if "github.com" not in code:
                found.update((name, page.relative_to(ROOT).as_posix()) for name in NAME.findall(code))
    return found


NAMES = code_names()


def resolve(name):
    """What a dotted name stands for: a module, or an attribute of one."""
    thing = granet
    for depth, part in enumerate(name.split(".")[1:], start=2):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = import_module(".".join(name.split(".")[:depth]))
    return thing


def test_the_docs_name_modules():
    assert {"granet.Sparsifier", "granet.ranks.leave", "granet.topology"} <= NAMES.keys()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_names_in_the_docs_exist(name):
    for module, needed in OPTIONAL.items():
        if name.startswith(module) and find_spec(needed) is None:
            pytest.skip(f"needs the extra granet[{module.rpartition('.')[2]}]")
    resolve(name)


def test_public_modules_work_after_importing_granet_alone():
    """In a new process, where nothing else has imported them."""
    public = sorted({".".join(name.split(".")[:3]) for name in NAMES} & {f"granet.{name}" for name in dir(granet)})
    code = f"import granet\nfor name in {public!r}:\n    dir(eval(name))\ngranet.ranks.leave\ngranet.selection.unfit"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dir_shows_public_names_alone():
    stub = (ROOT / "src/granet/__init__.pyi").read_text()
    assert set(dir(granet)) == {*re.findall(r"import \w+ as (\w+)", stub), "__version__"}


@pytest.mark.parametrize("name", granet.METHODS)
def test_help_explains_every_parameter_of_a_method(name):
    method = granet.METHODS[name]
    text = pydoc.render_doc(method, renderer=pydoc.plaintext)
    for field in dataclasses.fields(method):
        assert re.search(rf"^ \|\s+{field.name}: \S+ \S+", text, re.MULTILINE), field.name


EXPLAINED = {"Sparsifier", "Probe", "plan", "prune", "import_masks", "compile", "accelerate", "pack", "save", "load"}


@pytest.mark.parametrize("name", sorted(EXPLAINED))
def test_help_explains_every_parameter(name):
    thing = getattr(granet, name)
    text = inspect.getdoc(thing)
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^\s+\**{parameter}: \S+ \S+", text, re.MULTILINE), parameter


def test_the_architecture_page_names_every_folder_and_module():
    text = (ROOT / "docs/architecture.md").read_text()
    named = {name.strip("/") for name in re.findall(r"`([\w/]+)`", text)}
    package = ROOT / "src/granet"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert there - {"__init__"} - named == set()


def test_the_architecture_page_names_nothing_else():
    """The first column of its table holds what lies in the package, and no more."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    package = ROOT / "src/granet"
    assert {name for name in named if not (package / name).is_dir() and not (package / f"{name}.py").exists()} == set()


def test_versions_agree():
    """It stands in `granet.__version__`, where the build reads it. tests/native/test_wheel.py looks at a wheel."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == granet.__version__
    versions = re.findall(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0][0] == granet.__version__


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    listed = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    made = {"docs/api/command-line.md"}  # of the commands' help, by `make docs`
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} == listed - made


NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def test_the_readme_says_what_gets_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "README.md").read_text()
    needed = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
    sentence = re.search(r"The library needs (\w+) packages: (.*?)\.", text)
    assert sentence[1] == NUMBERS[len(needed)]
    assert set(re.split(r", | and ", sentence[2])) == set(needed)
    assert set(re.findall(r"`granet\[(\w+)\]`", text)) == set(project["optional-dependencies"])
