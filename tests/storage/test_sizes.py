"""The table of a file: what each tensor takes, against dense and against the entropy."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import granet
from granet.engine.precision import quantised_weight
from granet.storage.saving import opened
from granet.storage.sizes import as_json, as_text, sizes


def information(*counts):
    """The bits of so many occurrences of each symbol, in any order."""
    return -sum(n * math.log2(n / sum(counts)) for n in counts if n)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200), nn.Linear(200, 100))
    model[2].weight = model[0].weight
    return model


@pytest.fixture
def path(tmp_path, model):
    sparsifier = granet.Sparsifier(model, granet.Static(sparsity=0.9))
    granet.save(sparsifier, tmp_path / "a.safetensors", "int8")
    return tmp_path / "a.safetensors"


def found(path):
    with opened(path) as packed:
        return packed, {size.name: size for size in sizes(packed)}


def test_sizes_add_up_to_the_file(path, model):
    packed, by_name = found(path)
    assert list(by_name) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert sum(size.nbytes for size in by_name.values()) == packed.nbytes < path.stat().st_size
    weight = by_name["0.weight"]
    assert weight.dense == 200 * 100 * 4 and weight.shape == (100, 200) and weight.stored == "distances + int8"
    numbers = quantised_weight(model[0].weight.detach())[0]
    counts = numbers[numbers != 0].unique(return_counts=True)[1].tolist()
    assert weight.nonzero == sum(counts) and weight.density == sum(counts) / 20_000
    least = information(*counts) + information(sum(counts), 20_000 - sum(counts))
    assert weight.limit == math.ceil(least / 8) + 4 * 100 < weight.nbytes < 1.1 * weight.limit
    assert by_name["0.bias"].stored == "float32" and by_name["0.bias"].nbytes == 400


def test_the_table_has_all_tensors_and_a_total(path):
    packed, by_name = found(path)
    text = as_text(packed, list(by_name.values()), path.stat().st_size)
    head, _, *lines = text.splitlines()
    assert (
        head.startswith(f"granet {granet.__version__}, method Static(")
        and "sparsity 0.9" in head
        and head.endswith("dtype int8")
    )
    assert "tied to 0.weight" in next(line for line in lines if line.startswith("2.weight"))
    assert f"{path.stat().st_size:,}" in next(line for line in lines if line.startswith("all"))
    assert lines[-1].endswith("times the limit")
    values = json.loads(json.dumps(as_json(packed, list(by_name.values()), 5)))
    assert values["bytes"] == 5 and values["about"]["dtype"] == "int8" and values["ties"] == {"2.weight": "0.weight"}
    assert values["tensors"][0]["shape"] == [100, 200]


def test_files_of_others_are_measured_too(tmp_path):
    save_file({"w": torch.eye(100), "m": torch.eye(100) > 0, "e": torch.zeros(0)}, tmp_path / "a")
    packed, by_name = found(tmp_path / "a")
    assert by_name["w"].density == by_name["m"].density == 0.01
    assert by_name["w"].limit == math.ceil(300 + information(100, 9_900) / 8)  # all top bytes are equal
    assert by_name["m"].limit == math.ceil(information(100, 9_900) / 8)
    assert as_text(packed, list(by_name.values()), 100).startswith("tensor")


def test_nothing_is_measured_too(tmp_path):
    save_file({}, tmp_path / "a")
    packed, by_name = found(tmp_path / "a")
    assert by_name == {} and "all" in as_text(packed, [], 10)
