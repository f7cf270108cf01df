"""Files that fit no model, or contradict themselves: refused by name, before anything is allocated or changed."""

import json
import os
import zlib
from math import prod

import pytest
import torch
from hypothesis import given, settings, strategies
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import granet
from granet.storage.container import StorageError


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40), nn.BatchNorm1d(40))
    with torch.no_grad():
        for at in (0, 2):
            kept = torch.rand(model[at].weight.shape) < 0.1
            model[at].weight.copy_(model[at].weight.where(kept, 0))
    return model


def snapshot(model):
    return {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def unchanged(model, before):
    after = model.state_dict(keep_vars=True)
    return before.keys() == after.keys() and all(
        id(after[name]) == number and torch.equal(after[name], tensor) for name, (number, tensor) in before.items()
    )


class File:
    """The header, the metadata and the bytes of a file that can be changed and written again."""

    def __init__(self, path):
        self.path, content = path, path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        self.header, self.data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        self.about = json.loads(self.header["__metadata__"]["granet"])

    def write(self):
        if "__metadata__" in self.header:
            self.header["__metadata__"]["granet"] = json.dumps(self.about)
        text = json.dumps(self.header).encode()
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.data)

    def entry(self, name="0.weight"):
        return self.about["tensors"][name]

    def part(self, name):
        begin, end = self.header[name]["data_offsets"]
        return memoryview(self.data)[begin:end]


def entry(name, **changes):
    return lambda file: file.entry(name).update(changes)


def renamed(file):
    file.about["tensors"]["elsewhere"] = file.about["tensors"].pop("2.bias")
    file.header["elsewhere"] = file.header.pop("2.bias")


def without(*parts):
    def change(file):
        for part in parts:
            begin, end = file.header.pop(part)["data_offsets"]
            del file.data[begin:end]
            for name, claim in file.header.items():
                if name != "__metadata__" and claim["data_offsets"][0] >= end:
                    claim["data_offsets"] = [offset - (end - begin) for offset in claim["data_offsets"]]

    return change


def forgotten(file):
    without("2.bias")(file)
    del file.about["tensors"]["2.bias"]


def one_more_bit(file):
    file.part("0.weight:where")[0] ^= 1


def bit_moved_to_the_end(file):
    """The unary code has its last bits as far behind as it can: the distances add up to more than the tensor has."""
    where = file.part("0.weight:where")
    ones = sum(byte.bit_count() for byte in where)
    where[:] = bytes(len(where))
    for at in range(8 * len(where) - ones, 8 * len(where)):
        where[at // 8] |= 0x80 >> at % 8
    file.part("0.weight:low")[:] = b"\xff" * len(file.part("0.weight:low"))


def stored_twice(file):
    begin = len(file.data)
    file.header["0.weight"] = {"dtype": "F32", "shape": [50, 60], "data_offsets": [begin, begin + 12_000]}
    file.data += bytes(12_000)


def scales_of_nan(file):
    file.part("0.weight:scales")[:4] = b"\xff" * 4


def claimed_number(file):
    file.header["2.bias"]["shape"] = [2**40]


def damaged_code(file):
    file.part("0.weight:top")[:] = bytes(len(file.part("0.weight:top")))


def code_of_others(file):
    """The exponents of another number of values, as a bomb would have: the place in the file is that of before."""
    top = file.part("0.weight:top")
    code = zlib.compress(bytes(10 * len(top)))
    top.release()
    without("0.weight:top")(file)
    end = len(file.data)
    file.header["0.weight:top"] = {"dtype": "U8", "shape": [len(code)], "data_offsets": [end, end + len(code)]}
    file.data += code


def dtype_of(part, dtype):
    return lambda file: file.header[part].update(dtype=dtype)


HOSTILE = {
    "cut short": (lambda file: file.data.__delitem__(slice(-100, None)), "the file is truncated"),
    "a name outside the model": (renamed, "the model has no tensor 'elsewhere'"),
    "a tensor that is missing": (forgotten, "has no tensor '2.bias', which the model needs"),
    "another shape": (entry("0.weight", shape=[60, 50]), r"tensor '0.weight' has shape \(60, 50\), .* \(50, 60\)"),
    "a shape of terabytes": (entry("0.weight", shape=[2**24, 2**20]), "tensor '0.weight' has shape"),
    "a size that is only claimed": (claimed_number, "tensor '2.bias': a F32 tensor of shape .* and has 160"),
    "another kind of numbers": (
        entry("0.weight", dtype="int64", stored="float32"),
        "stored as torch.float32, and cannot",
    ),
    "numbers of another size": (
        entry("0.weight", stored="bfloat16"),
        "uint8 of shape .*, 3\\), and .*, 1\\) is needed",
    ),
    "fewer values than it says": (entry("0.weight", active=5, low=0), r"torch.uint8 of shape \(375,\) is needed"),
    "no values": (without("0.weight:top"), "its part '0.weight:values' is missing"),
    "no lower bytes": (without("0.weight:rest"), "its part '0.weight:rest' is missing"),
    "lower bytes that are texts": (dtype_of("0.weight:rest", "I8"), "torch.int8 of shape .*, and torch.uint8 of shape"),
    "a damaged code": (damaged_code, "the code of its values' exponents is damaged"),
    "a code of other values": (code_of_others, "the code of its values' exponents has more or other than"),
    "more values than entries": (entry("0.weight", active=3001), "3001 of its entries are stored, and it has 3,000"),
    "a bit too many": (one_more_bit, "tensor '0.weight': .* bits of its mask are set, and there are"),
    "indices out of range": (bit_moved_to_the_end, "the index of its last value is .*, and it has 3,000 entries"),
    "a part that is missing": (without("0.weight:where"), "its part '0.weight:where' is missing"),
    "planes that are missing": (without("0.weight:low"), "its part '0.weight:low' is missing"),
    "low bits beyond measure": (entry("0.weight", low=10**9), "the low bits of its code are 1000000000, and 0 to 40"),
    "low bits as a text": (entry("0.weight", low="3"), "the low bits of its code are '3'"),
    "dense and sparse at once": (stored_twice, "tensor '0.weight' is stored twice"),
    "no metadata": (lambda file: file.header.pop("__metadata__"), "the model has no tensor '0.weight:"),
    "metadata that are a list": (lambda file: setattr(file, "about", [1]), "metadata 'granet' are damaged"),
    "tensors that are a list": (lambda file: file.about.update(tensors=[1]), "metadata 'granet' are damaged"),
    "another format": (lambda file: file.about.update(format=2), "format 2, and this version of granet reads 1"),
    "tied to nothing": (lambda file: file.about["ties"].update(a="b"), "tensor 'a' is said to be 'b', which is not"),
    "tied to a number": (lambda file: file.about["ties"].update(a=1), "the tied tensors are"),
    "tied to one of its own": (lambda file: file.about["ties"].update({"2.bias": "0.bias"}), "'2.bias' is said to be"),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "strange.safetensors"
    granet.save(net(), path)
    return File(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_the_model_stays_as_it_was(name, file):
    change, message = HOSTILE[name]
    change(file)
    file.write()
    model = net()
    before = snapshot(model)
    with pytest.raises(StorageError, match=message) as error:
        granet.load(file.path, into=model)
    assert "strange.safetensors" in str(error.value)
    assert unchanged(model, before)


@settings(max_examples=50, deadline=None)
@given(strategies.data())
def test_no_damage_does_anything_but_raise_storage_errors(tmp_path_factory, data):
    """Damage to values cannot be seen; all other damage leaves the model as it was."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    granet.save(net(), path, data.draw(strategies.sampled_from([None, "int8"])))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(strategies.integers(1, 3))):
        at = data.draw(strategies.integers(0, header - 1) | strategies.integers(0, len(content) - 1))
        kind = data.draw(strategies.sampled_from(["change", "digit", "cut", "grow"]))
        if kind == "change":
            content[at] = data.draw(strategies.integers(0, 255))
        elif kind == "digit":
            content[at] = data.draw(strategies.sampled_from(b'0123456789-e.[]{}",: '))
        elif kind == "cut":
            del content[at : at + data.draw(strategies.integers(1, 50))]
        else:
            content[at:at] = bytes(data.draw(strategies.integers(1, 50)))
        if not content:
            break
    path.write_bytes(content)
    model = net()
    before = snapshot(model)
    for into in (None, model):
        try:
            granet.load(path, into=into)
        except StorageError:
            assert unchanged(model, before)


def test_the_file_itself_is_fine(file):
    file.write()
    granet.load(file.path, into=net())


def test_impossible_scales_are_refused(tmp_path):
    path = tmp_path / "strange.safetensors"
    granet.save(net(), path, "int8")
    file = File(path)
    scales_of_nan(file)
    file.write()
    model = net()
    before = snapshot(model)
    with pytest.raises(StorageError, match=r"strange.safetensors: tensor '0.weight': its scales have NaN"):
        granet.load(path, into=model)
    assert unchanged(model, before)


def test_a_file_that_claims_more_than_the_memory_is_refused_without_a_model_too(file):
    without("0.weight:where", "0.weight:low", "0.weight:top", "0.weight:rest")(file)
    for part, dtype, shape in (("where", "U8", [0]), ("low", "U8", [40, 0]), ("values", "F32", [0])):
        end = len(file.data)
        file.header[f"0.weight:{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}
    file.entry().update(shape=[2**23, 2**23], active=0, low=40)
    file.write()
    with pytest.raises(StorageError, match=r"claims 281,474,976,7\d\d,\d\d\d bytes of dense tensors"):
        granet.load(file.path)


def test_bools_that_are_neither_true_nor_false_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.tensor([False, True, True])}, path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(StorageError, match="tensor 'a': its bytes must be 0 or 1"):
        granet.load(path)


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        granet.load(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(StorageError, match="is no plain file"):
            granet.load(path)


def test_a_pickle_is_not_opened(tmp_path):
    torch.save(net().state_dict(), tmp_path / "a.pt")
    with pytest.raises(StorageError, match="is not a safetensors file"):
        granet.load(tmp_path / "a.pt")


def test_a_pruned_model_is_told_how_to_become_a_plain_one(file):
    model = net()
    prune.identity(model[0], "weight")
    with pytest.raises(StorageError, match=r"no tensor '0.weight'; it is pruned by .*: call granet.import_masks"):
        granet.load(file.path, into=model)


def test_models_whose_tensors_have_no_values_are_refused(file):
    with pytest.raises(StorageError, match=r"'0.weight' is on the meta device"):
        granet.load(file.path, into=net().to("meta"))


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 20)
        self.head = nn.Linear(20, 30, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    path = tmp_path / "a.safetensors"
    granet.save(Tied(), path)
    assert path.stat().st_size < 30 * 20 * 4 + 1000
    for model in (Tied(), Tied(tied=False)):
        embedding = model.embedding.weight
        granet.load(path, into=model)
        assert model.head.weight is model.embedding.weight is embedding
        assert torch.equal(model.head.weight, Tied().head.weight)
    found = granet.load(path)
    assert found["head.weight"] is found["embedding.weight"]


def test_weights_that_only_the_model_ties_are_refused(tmp_path):
    granet.save(Tied(tied=False), tmp_path / "a")
    model = Tied()
    before = snapshot(model)
    with pytest.raises(StorageError, match=r"'head.weight' and 'embedding.weight' are two tensors, and in the model"):
        granet.load(tmp_path / "a", into=model)
    assert unchanged(model, before)


def test_weights_that_cannot_be_tied_are_refused(tmp_path):
    granet.save(Tied(), tmp_path / "a")
    model = Tied(tied=False)
    model.head.double()
    before = snapshot(model)
    with pytest.raises(StorageError, match=r"one tensor in the file, and in the model a Parameter of torch.float64"):
        granet.load(tmp_path / "a", into=model)
    assert unchanged(model, before)


def test_names_that_wrappers_prefix_are_the_same_names(file):
    model = torch.compile(net(), backend="eager")
    with torch.no_grad():
        model.get_parameter("_orig_mod.0.weight").zero_()
    granet.load(file.path, into=model)
    assert torch.equal(model._orig_mod[0].weight, net()[0].weight)
    averaged = torch.optim.swa_utils.AveragedModel(net())
    granet.save({name: tensor for name, tensor in averaged.state_dict().items() if name != "n_averaged"}, file.path)
    granet.load(file.path, into=net())


def test_a_file_of_others_loads_too(tmp_path):
    model = net()
    save_file(model.state_dict(), tmp_path / "a")
    other = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 40), nn.BatchNorm1d(40))
    granet.load(tmp_path / "a", into=other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert prod(granet.load(tmp_path / "a")["0.weight"].shape) == 3000
