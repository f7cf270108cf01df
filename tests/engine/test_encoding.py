"""Programs are written down in the same way on both sides: in Python and in the C++ header."""

import re

import pytest
import torch

from granet import native
from granet.engine import encoding, ops

HEADER = (native.SOURCES / "program.h").read_text()
STRUCTS = dict(re.findall(r"struct (\w+(?:Step|Row)) \{\s*int64_t ([^;]+);", HEADER))


@pytest.mark.parametrize("row", [encoding.SlotRow, *encoding.STEPS], ids=lambda row: row.__name__)
def test_fields_have_the_header_s_names_in_its_order(row):
    fields = re.split(r",\s*", STRUCTS[row.__name__])
    operation = [] if row is encoding.SlotRow else ["op"]
    assert fields == [*operation, *row._fields]


def test_operations_have_the_header_s_numbers():
    names = re.search(r"enum Op : int64_t \{ (.*), kOps \}", HEADER)[1].replace(" = 0", "").split(", ")
    assert [f"k{step.__name__.removesuffix('Step')}" for step in encoding.STEPS] == names
    kinds = re.search(r"enum Kind : int64_t \{ (.*), kKinds \}", HEADER)[1].replace(" = 0", "").split(", ")
    assert [f"k{kind.title()}" for kind in encoding.KINDS] == kinds
    header = (native.SOURCES / "reduced.h").read_text()
    precisions = (
        re.search(r"enum Precision : int64_t \{ (.*), kPrecisions \}", header)[1].replace(" = 0", "").split(", ")
    )
    assert [f"k{precision.title()}" for precision in encoding.PRECISIONS] == precisions


def test_kernels_of_another_version_are_refused_when_they_are_loaded():
    ops.prepare()
    here = torch.ops.granet.encoding()
    encoding.check(here)
    with pytest.raises(RuntimeError, match=r"another version of granet .* compile them anew"):
        encoding.check([here[0] + 1, *here[1:]])


def test_a_program_is_its_counts_and_its_rows():
    slot = encoding.SlotRow(0, 1, 1, 1, 2, 2, 2, 1, 0, 16)
    numbers = encoding.encode([slot], [encoding.AddStep(0, 0, -1, 1)], [0])
    assert numbers[:2] == [1, 1] and len(numbers) == 2 + 2 * encoding.ROW_LENGTH
    assert numbers[2 : 2 + len(slot)] == list(slot) and numbers[2 + encoding.ROW_LENGTH :][:5] == [6, 0, 0, -1, 1]
