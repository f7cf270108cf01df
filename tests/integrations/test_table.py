"""docs/integrations.md claims nothing without a test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text()


def functions_of(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)#(\w+)\)", PAGE)
    assert len(named) > 50
    assert not {f"{path}::{name}" for path, name in named if name not in functions_of(ROOT / path)}


def test_no_cell_of_the_table_claims_what_no_test_shows():
    table = PAGE.split("## What is tested")[1].split("**Clipping.**")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6 and {len(row) for row in rows} == {10}
    cell = re.compile(r"\[[^]]+\]\(\.\./tests/[\w/]+\.py#test_\w+\)(, )?")
    assert [text for row in rows for text in row[1:] if cell.sub("", text).strip()] == []


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", PAGE)
    assert links and not [link for link in links if not (ROOT / "docs" / link).exists()]
