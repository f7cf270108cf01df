"""Summaries and records of runs are checked before a table or a page relies on them."""

import copy
import json

import pytest

from granet.train.summary import read_object, read_records, read_summary

FLOPS = {"inference": 1.0, "inference_dense": 2, "training": 3e9, "training_dense": 6e9}
SCORE = {"step": 9, "test_accuracy": 0.5, "validation_accuracy": 0.5}
LAYER = {"name": "fc", "shape": [2, 3], "total": 6, "active": 3, "flops": 6}
SUMMARY = {
    "name": "a", "method": "granet", "model": "mlp", "data": "digits", "seed": 0, "sparsity": 0.5, "exploration": 1.0,
    "parameters": {"total": 8, "active": 5}, "flops": FLOPS, "best": SCORE, "last": dict(SCORE), "seconds": 1.5,
    "steps": 9, "layers": [LAYER], "more": "may be there",
}  # fmt: skip
EVAL = {"kind": "eval", "step": 1, "epoch": 0.5, "loss": 1.0, "accuracy": 0.5, "sparsity": 0.5, "realised_sparsity": 0}


def test_what_is_sound_comes_back_as_it_is(tmp_path):
    file = tmp_path / "summary.json"
    for summary in (SUMMARY, SUMMARY | {"best": None, "exploration": None}):
        file.write_text(json.dumps(summary))
        assert read_summary(file) == summary
    assert read_summary(tmp_path / "none.json") is None
    diverged = EVAL | {"loss": float("inf")}  # a validation loss may be
    records = [EVAL, diverged, {"kind": "of another version", "step": "x"}]
    lines = tmp_path / "metrics.jsonl"
    lines.write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "tr')
    assert list(read_records(lines)) == records


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("name",), 3), (("sparsity",), "0.5"), (("sparsity",), 1.5), (("sparsity",), float("nan")), (("seed",), None),
        (("flops", "inference_dense"), 0), (("flops", "training"), float("inf")), (("flops", "training"), 10**400),
        (("flops",), []), (("best",), 0.5), (("last",), None), (("last", "test_accuracy"), None), (("steps",), 0),
        (("parameters", "active"), 1.5), (("parameters", "total"), 10**30), (("seconds",), -1), (("seconds",), True),
        (("layers",), {}), (("layers", 0, "total"), 0), (("layers", 0, "shape"), "2x3"), (("layers", 0, "name"), None),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(tmp_path, path, value):
    summary = copy.deepcopy(SUMMARY)
    place = summary
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary))
    where = r"\.".join(map(str, path))
    with pytest.raises(ValueError, match=rf"summary\.json is damaged: {where} cannot be ") as error:
        read_summary(file)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("change", [{"step": 1.5}, {"step": -1}, {"step": 10**30}, {"epoch": float("nan")},
                                    {"epoch": "1"}, {"accuracy": None}, {"kind": None}, {"sparsity": 2}])  # fmt: skip
def test_a_record_that_cannot_be_is_named(tmp_path, change):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(EVAL) + "\n" + json.dumps(EVAL | change) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged: "):
        list(read_records(file))


@pytest.mark.parametrize("content", [b"[]", b"1", b"{", b"\xff", b"", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_object_is_damaged(tmp_path, content):
    file = tmp_path / "environment.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"environment\.json is damaged: ") as error:
        read_object(file)
    assert len(str(error.value).splitlines()) == 1
