"""Safetensors files: the library reads ours, we read the library's, and what a header claims is checked."""

import io
import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from granet.storage import container
from granet.storage.container import Part, StorageError


def part(tensor):
    return Part(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def examples():
    """One tensor of every dtype, of random bits, beside an empty one and a single number."""
    generator = torch.Generator().manual_seed(0)
    found = {"number": torch.tensor(7), "empty": torch.zeros(0, 3)}
    for name, dtype in container.DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (2, 3 * dtype.itemsize), generator=generator)
        found[name] = raw.to(torch.uint8).view(dtype)
    return found


def raw(tensor):
    return tensor.dtype, tuple(tensor.shape), bytes(container.memory(tensor))


def test_the_library_reads_what_is_written(tmp_path):
    tensors = examples()
    with (tmp_path / "a").open("wb") as file:
        container.write(file, {"key": "value"}, {name: part(tensor) for name, tensor in tensors.items()})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"key": "value"}
        assert {name: raw(file.get_tensor(name)) for name in file.keys()} == {k: raw(v) for k, v in tensors.items()}  # noqa: SIM118


def test_what_the_library_writes_is_read():
    tensors = examples()
    content = safetensors.torch.save(tensors, {"key": "value"})
    metadata, parts = container.read(io.BytesIO(content), "a")
    assert metadata == {"key": "value"}
    assert {name: raw(found.read()) for name, found in parts.items()} == {k: raw(v) for k, v in tensors.items()}


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def claim(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": (b"", "truncated: it has 0 in all"),
    "text": (b"not tensors at all", "its header would have .* bytes, and it has 18 in all"),
    "a header longer than the file": (file({}, length=2**60), "its header would have 1,152,921,504,606,846,976 bytes"),
    "no JSON": (file(b"{{{"), "its header is no JSON"),
    "deep JSON": (file(b"[" * 100_000), "its header is no JSON"),
    "a list": (file([1]), "its header is"),
    "metadata that are no texts": (file({"__metadata__": {"a": 1}}), "texts by name are allowed"),
    "a tensor that is a number": (file({"a": 5}), "tensor 'a': the header says 5 of it"),
    "no shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "tensor 'a': the header says"),
    "an unknown dtype": (file({"a": claim("F3")}, b"x" * 8), "its dtype is 'F3', and these can be read: F64, F32"),
    "a dtype that is a list": (file({"a": claim(["F32"])}, b"x" * 8), "tensor 'a'"),
    "a negative dimension": (file({"a": claim(shape=[-2, -1])}, b"x" * 8), "whole numbers are allowed"),
    "a dimension of another kind": (file({"a": claim(shape=[True, 2.0])}, b"x" * 8), "whole numbers are allowed"),
    "three offsets": (file({"a": claim(offsets=[0, 8, 8])}, b"x" * 8), "whole numbers are allowed"),
    "more than the file has": (
        file({"a": claim(shape=[2**40], offsets=[0, 2**42])}, b"x" * 8),
        "the file is truncated",
    ),
    "an overflowing shape": (file({"a": claim(shape=[2**32] * 2 + [4])}, b"x" * 8), "takes .* bytes, and has 8"),
    "a shape larger than its place": (file({"a": claim(shape=[3])}, b"x" * 8), "takes 12 bytes, and has 8"),
    "tensors that overlap": (
        file({"a": claim(), "b": claim(offsets=[4, 12])}, b"x" * 12),
        "tensor 'b' overlaps the one before",
    ),
    "a hole": (file({"a": claim(), "b": claim(offsets=[16, 24])}, b"x" * 24), "leaves bytes before it unused"),
    "bytes at the end": (file({"a": claim()}, b"x" * 12), "has 4 bytes after its last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_header_only_claims_is_refused(name):
    content, message = HOSTILE[name]
    with pytest.raises(StorageError, match=message) as error:
        container.read(io.BytesIO(content), "strange.safetensors")
    assert str(error.value).startswith("strange.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1000)}))
    with path.open("r+b") as opened:
        _, parts = container.read(opened, "a")
        opened.truncate(1000)
        with pytest.raises(StorageError, match=r"a: tensor 'a' ends after .* of 4,000 bytes: the file changed"):
            parts["a"].read()
