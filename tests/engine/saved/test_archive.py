"""Files that are damaged, or made to do harm, are refused before anything runs, with a message that names them."""

import copy
import json

import pytest
import torch
from fuzz_models import network
from fuzz_saved import PATH, archived, check_changes, closed, loaded, opened
from torch import nn

import granet
from granet.engine.capture import trace
from granet.engine.saved import archive
from granet.engine.saved.archive import CompiledFileError


@pytest.fixture(scope="module")
def contents():
    """Files of one network by precision; in that of float32, one layer runs on the kernel of four rows."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 24)
    (traced,) = trace(network(nn.ReLU(), 0.4), x)
    return {p: archived(traced, x, p, block=True)[0] for p in ("float32", "bfloat16", "int8")}


def segment(header):
    return next(node for node in header["programs"][0]["nodes"] if node["op"] == "segment")


def layer(header, number=0):
    return [step for step in segment(header)["steps"] if step["op"] == "layer"][number]


def step(header, op):
    return next(step for step in segment(header)["steps"] if step["op"] == op)


def call(header):
    return next(node for node in header["programs"][0]["nodes"] if node["op"] == "call")


def tensor(tensors, part):
    """The name of the first layer's tensor."""
    return min((n for n in tensors if n.endswith(f".{part}")), key=lambda n: [int(k) for k in n.split(".")[:3]])


HEADERS = {  # a change of the header, and what the message says
    "another version": (
        lambda h: h.update(format=7),
        "it has version 7 of the format .* save the compiled model again",
    ),
    "no format": (lambda h: h.pop("format"), "its header is damaged, at format: Field required"),
    "no programs": (lambda h: h.update(programs=[]), "programs: Tuple should have at least 1 item"),
    "unknown field": (lambda h: h.update(code="import os"), "code: Extra inputs are not permitted"),
    "unknown step": (lambda h: step(h, "add").update(op="write_file"), "'write_file' found using 'op' does not match"),
    "unknown operator": (
        lambda h: call(h).update(name="set_.source_Storage"),
        "unknown operator 'set_.source_Storage'",
    ),
    "code as operator": (lambda h: call(h).update(name="__class__"), "unknown operator '__class__'"),
    "text for a number": (lambda h: segment(h).update(images="2"), "Input should be a valid integer"),
    "circle of steps": (lambda h: step(h, "add").update(inputs=[40, 40]), "refers to the result of step 40, and there"),
    "circle of nodes": (lambda h: call(h).update(args=[{"node": 99}, 0]), "refers to node 99, and there are"),
    "itself": (lambda h: segment(h).update(inputs=[90]), "refers to node 90"),
    "too many results": (lambda h: h["programs"][0].update(results=[3, 400]), "it returns the result of node 400"),
    "no such result": (lambda h: h["programs"][0].update(output={"result": 5}), "its output has no result 5"),
    "no form": (lambda h: h["programs"][0].update(output={"class": "os"}), "is no form of arguments or of an output"),
    "argument": (lambda h: h["programs"][0].update(inputs={"tuple": [{"tuple": []}, {"dict": []}]}), "with 0 tensors"),
    "negative": (lambda h: layer(h).update(padding=[-1, 0]), "greater than or equal to 0"),
    "no network": (lambda h: layer(h)["out"].update(channels=13), "does not hold"),
    "channels": (lambda h: layer(h, 1).update(channels=6), "it takes 6 channels, not 12"),
    "groups": (lambda h: layer(h, 1).update(groups=5), "do not divide into 5 groups"),
    "kernel": (lambda h: layer(h, 1).update(kernel=[3, 3]), "its output is"),
    "window": (lambda h: step(h, "max_pool").update(padding=[3, 3]), "padding is not below the kernel"),
    "residual": (lambda h: step(h, "add")["inputs"].__setitem__(0, 0), "its values differ in channels and size"),
    "layout": (lambda h: layer(h).update(lanes=[64, 0, 64]), "than this version of granet lays them"),
    "images": (lambda h: segment(h).update(images=2**30), "does not hold"),
    "stride": (lambda h: segment(h)["forms"][0][0].update(stride=[1, 10**9]), "cannot have the stride"),
    "chunks": (lambda h: layer(h).update(chunks=5), "do not fit .* rows in 5 chunks"),
    "blocks": (lambda h: layer(h).update(blocks=1000), "do not fit 12 channels in 1000 blocks"),
    "kernels": (lambda h: layer(h).update(kind="words"), "kernel words does not compute float32"),
    "vector": (lambda h: layer(h).update(kind="vector"), "computes layers of one position only"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_impossible_headers_are_refused(contents, case):
    edit, message = HEADERS[case]
    header, tensors = opened(contents["float32"])
    edit(header)
    with pytest.raises(CompiledFileError, match=message) as error:
        loaded(closed(header, tensors))
    assert str(PATH) in str(error.value)


def put(part, place, value):
    def edit(tensors):
        name = tensor(tensors, part)
        tensors[name] = tensors[name].clone()
        tensors[name][place] = value

    return edit


def shorten(part):
    return lambda tensors: tensors.update({tensor(tensors, part): tensors[tensor(tensors, part)][:-1].clone()})


TENSORS = {  # the precision, a change of the tensors, and what the message says
    "place too high": ("float32", put("offset", 3, 2**30), "it reads from place .* outside of"),
    "place too low": ("int8", put("offset", 3, -(2**30)), "it reads from place .* outside of"),
    "just outside": ("bfloat16", put("offset", 0, -8000), "it reads from place -8000"),
    "row outside": ("float32", put("id", 2, 10**6), "its rows do not belong to one output channel each"),
    "negative row": ("int8", put("id", 0, -1), "its rows do not belong to one output channel each"),
    "row twice": ("bfloat16", put("id", 0, 1), "its rows do not belong to one output channel each"),
    "beginning outside": ("float32", put("ptr", 1, 10**6), "its rows do not begin one after another"),
    "negative beginning": ("int8", put("ptr", 0, -4), "its rows do not begin one after another"),
    "end outside": ("float32", put("ptr", -1, 10**6), "its rows do not begin one after another"),
    "fewer beginnings": ("float32", shorten("ptr"), "beginnings of rows do not fit"),
    "fewer rows": ("int8", shorten("id"), "rows do not fit"),
    "fewer weights": ("float32", shorten("value"), "weights do not fit"),
    "fewer words": ("int8", shorten("value"), "weights do not fit"),
    "fewer biases": ("bfloat16", shorten("bias"), "biases do not fit"),
    "fewer scales": ("int8", shorten("scale"), "scales do not fit"),
    "fewer factors": ("int8", shorten("factors"), "scales do not fit"),
    "NaN in scales": ("int8", put("scale", 0, torch.nan), "its tensor scale holds NaN or infinite values"),
    "infinite factor": ("int8", put("factors", 1, torch.inf), "its tensor factors holds NaN or infinite values"),
    "another type": (
        "float32",
        lambda t: t.update({tensor(t, "offset"): t[tensor(t, "offset")].float()}),
        r"its tensor offset must be a list of torch.int32",
    ),
    "missing": ("bfloat16", lambda t: t.pop(tensor(t, "value")), "its tensor value is missing"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_index_structures_that_lead_outside_are_refused(contents, case):
    precision, edit, message = TENSORS[case]
    header, tensors = opened(contents[precision])
    edit(tensors)
    with pytest.raises(CompiledFileError, match=message):
        loaded(closed(header, tensors))


@pytest.mark.parametrize(
    ("scale", "message"),
    [(float("nan"), "finite number|greater than 0"), (float("inf"), "finite number"), (0.0, "greater than 0")],
)
def test_impossible_formats_are_refused(contents, scale, message):
    header, tensors = opened(contents["int8"])
    step(header, "convert")["out"]["scale"] = scale
    with pytest.raises(CompiledFileError, match=message):
        loaded(closed(header, tensors))


def test_a_segment_returns_only_float32(contents):
    header, tensors = opened(contents["int8"])
    own = segment(header)
    own["outputs"][0] = next(i for i, s in enumerate(own["steps"]) if s["out"]["precision"] == "int8")
    with pytest.raises(CompiledFileError, match="returns a value that is not in float32"):
        loaded(closed(header, tensors))


def test_files_that_are_cut_or_something_else(contents, tmp_path):
    path, content = tmp_path / "model.granet", contents["int8"]
    for length in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CompiledFileError, match=r"model.granet is not a safetensors file, or not a whole one"):
            granet.load_compiled(path)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)  # claims four terabytes
    with pytest.raises(CompiledFileError, match="not a whole one"):
        granet.load_compiled(path)
    path.write_bytes(archive.safetensors.torch.save({"w": torch.zeros(2)}))
    with pytest.raises(CompiledFileError, match="but no compiled model that granet saved"):
        granet.load_compiled(path)
    path.write_bytes(archive.safetensors.torch.save({"w": torch.zeros(2)}, {archive.KEY: "[" * 100_000}))
    with pytest.raises(CompiledFileError, match="its header is damaged"):
        granet.load_compiled(path)
    with pytest.raises(FileNotFoundError):
        granet.load_compiled(tmp_path / "none.granet")
    with pytest.raises(OSError, match="is no plain file"):
        granet.load_compiled(tmp_path)
    (tmp_path / "link").symlink_to(path)
    path.write_bytes(content)
    assert granet.load_compiled(tmp_path / "link").nbytes > 0


def test_what_loads_after_random_changes_runs(contents):
    refused, ran = check_changes(0, 4)
    assert refused > 0 and ran > 0


def test_the_header_is_what_is_written(contents):
    header, tensors = opened(contents["float32"])
    again, _ = opened(closed(copy.deepcopy(header), tensors))
    assert again == header and header["format"] == 1
