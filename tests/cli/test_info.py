import json

import torch

import granet


def test_a_file_is_shown_as_a_table_and_as_json(say, tmp_path):
    weight = torch.zeros(100, 50)
    weight[::2, ::5] = 1.5
    granet.save({"layer.weight": weight}, tmp_path / "small.safetensors")
    code, out, _ = say("info", "small.safetensors")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if line.startswith("layer.weight"))
    assert row[1:6] == ["100x50", "distances", "+", "float32", "10.00%"]
    code, out, _ = say("info", "small.safetensors", "--json")
    assert code == 0 and json.loads(out)["tensors"][0]["nonzero"] == 500


def test_what_is_wrong_with_a_file_is_one_line(say, tmp_path):
    (tmp_path / "a").write_bytes(b"\x1b[2Jno tensors")
    for name, message in (("a", "a is not a safetensors file"), ("b", "there is no file b"), (".", "is no plain file")):
        code, _, err = say("info", name)
        assert code == 2 and message in err and len(err.splitlines()) == 1
