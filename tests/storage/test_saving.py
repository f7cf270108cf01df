"""Models come back bit for bit, whatever they are made of; files are replaced as a whole; memory stays small."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn
from torch.nn.utils import prune

import granet
from granet.storage import container
from granet.storage.saving import opened

DTYPES = list(container.DTYPES.values())
TENSORS = strategies.fixed_dictionaries(
    {
        "shape": strategies.lists(strategies.integers(0, 40), max_size=3).map(tuple),
        "dtype": strategies.sampled_from([torch.float32, *DTYPES]),
        "density": strategies.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]) | strategies.floats(0, 1),
        "seed": strategies.integers(0, 2**31),
        "tied": strategies.booleans(),
    }
)


class Random(nn.Module):
    """A module with tensors of random bits (NaN of any kind, infinite and subnormal numbers, -0.0), some tied."""

    def __init__(self, kinds, values=True):
        super().__init__()
        for i, kind in enumerate(kinds):
            module = nn.Module()
            tensor = random_bits(kind["shape"], kind["dtype"], kind["density"] if values else 1, kind["seed"] + values)
            if tensor.is_floating_point():
                module.weight = nn.Parameter(tensor, requires_grad=kind["seed"] % 2 == 0)
            else:
                module.register_buffer("weight", tensor)
            self.add_module(f"layer{i}", module)
            if kind["tied"]:
                twin = nn.Module()
                twin.register_parameter(
                    "weight", module.weight
                ) if tensor.is_floating_point() else twin.register_buffer("weight", module.weight)
                self.add_module(f"twin{i}", twin)


def random_bits(shape, dtype, density, seed):
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    flat = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator).to(torch.uint8)
    kept = torch.rand(count, generator=generator) < density
    flat = flat.where(kept.repeat_interleave(dtype.itemsize), 0)
    return (flat > 0 if dtype == torch.bool else flat.view(dtype)).view(shape)


def bits(tensor, signed_zeros):
    tensor = tensor.detach()
    if tensor.is_floating_point() and not signed_zeros:
        wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
        tensor = torch.where(wide == 0, torch.zeros((), dtype=tensor.dtype), tensor)
    if tensor.is_complex() and not signed_zeros:
        tensor = torch.where(tensor == 0, 0, tensor)
    return tensor.dtype, tuple(tensor.shape), bytes(container.memory(tensor.contiguous()))


@settings(max_examples=60, deadline=None)
@given(strategies.lists(TENSORS, max_size=4), strategies.booleans())
def test_any_model_comes_back_bit_for_bit(tmp_path_factory, kinds, signed_zeros):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    model, other = Random(kinds), Random(kinds, values=False)
    granet.save(model, path, signed_zeros=signed_zeros)
    held = {name: id(tensor) for name, tensor in other.state_dict(keep_vars=True).items()}
    assert granet.load(path, into=other) is other
    expected = {name: bits(tensor, signed_zeros) for name, tensor in model.state_dict().items()}
    after = other.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == held
    assert {name: bits(tensor, signed_zeros) for name, tensor in after.items()} == expected
    found = granet.load(path)
    assert {name: bits(tensor, signed_zeros) for name, tensor in found.items()} == expected
    packed = granet.pack(model, signed_zeros=signed_zeros)
    assert {name: bits(tensor, signed_zeros) for name, tensor in packed.unpack().items()} == expected
    assert list(found) == list(packed.unpack())
    with opened(path) as kept:
        assert kept.nbytes == packed.nbytes <= sum(t.nbytes for t in model.state_dict().values())


def sparse_net(density=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50), nn.BatchNorm1d(50))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand(layer.weight.shape) < density)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "int8", torch.int8])
def test_rounded_numbers_are_near_and_the_rest_is_as_it_was(tmp_path, dtype):
    model, other = sparse_net(), sparse_net()
    granet.save(model, tmp_path / "a", dtype)
    granet.load(tmp_path / "a", into=other)
    for (name, before), after in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if before.ndim == 2:
            allowed = before.abs() / 2**8 if "bfloat16" in str(dtype) else before.abs().amax(1, keepdim=True) / 253
            assert ((after - before).abs() <= allowed).all() and not after[before == 0].any(), name
            assert not torch.equal(after, before)
        else:
            assert torch.equal(after, before), name
    again = tmp_path / "b"
    granet.save(other, again, dtype)  # rounded once, it is rounded no more
    assert all(torch.equal(x, y) for x, y in zip(granet.load(again).values(), other.state_dict().values(), strict=True))


def test_a_file_is_as_small_as_the_network(tmp_path):
    model = sparse_net()
    sizes = {}
    for dtype in (None, "bfloat16", "int8"):
        granet.save(model, tmp_path / "a", dtype)
        sizes[dtype] = (tmp_path / "a").stat().st_size
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sizes[None] < 0.16 * dense
    assert sizes["int8"] < sizes["bfloat16"] < sizes[None]


def test_zeros_count_wherever_they_came_from():
    dense = granet.pack(sparse_net(1.0)).nbytes
    pruned = sparse_net(1.0)
    prune.global_unstructured([(pruned[0], "weight"), (pruned[2], "weight")], prune.L1Unstructured, amount=0.9)
    small = granet.pack(pruned).nbytes
    assert small < 0.2 * dense
    for layer in (pruned[0], pruned[2]):
        prune.remove(layer, "weight")  # half of the zeros are negative now
    assert granet.pack(pruned).nbytes == small
    thresholds = sparse_net(1.0)
    with torch.no_grad():
        for layer in (thresholds[0], thresholds[2]):
            layer.weight[layer.weight.abs() < 0.9 * layer.weight.abs().max()] = 0
    assert granet.pack(thresholds).nbytes < 0.2 * dense
    sparsifier = granet.Sparsifier(sparse_net(1.0), granet.Static(sparsity=0.9))
    assert granet.pack(sparsifier).nbytes < 0.2 * dense
    assert granet.pack(sparsifier.model.state_dict()).nbytes == granet.pack(sparsifier).nbytes


def test_a_packed_model_stays_what_it_was_when_the_model_changes():
    model = sparse_net(0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = granet.pack(model)
    with torch.no_grad():
        model[0].weight.fill_(7)
        model[3].weight.fill_(7)
    packed.unpack(into=model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_file_says_what_the_model_is(tmp_path):
    sparsifier = granet.Sparsifier(sparse_net(), granet.RigL(sparsity=0.9, end=100), pattern="1x4")
    granet.save(sparsifier.model, tmp_path / "a", "int8")
    with opened(tmp_path / "a") as found:
        assert found.about == {
            "granet": granet.__version__,
            "method": repr(sparsifier.method),
            "sparsity": sparsifier.sparsity,
            "pattern": "1x4",
            "dtype": "int8",
        }


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.safetensors"
    granet.save(sparse_net(), path)
    before = path.read_bytes()
    broken = sparse_net()
    broken[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"tensor '2.weight': it has NaN or infinite numbers, which int8 cannot hold"):
        granet.save(broken, path, "int8")
    with pytest.raises(ValueError, match="unknown dtype 'int4': choose from float32, bfloat16, int8"):
        granet.save(broken, path, "int4")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        granet.save(broken, tmp_path / "nowhere" / "a")
    with pytest.raises(OSError, match="Is a directory; what was there is untouched"):
        granet.save(broken, tmp_path)


FULL = """
import resource, sys, torch, granet
model = torch.nn.Linear(1000, 100)
granet.save(model, sys.argv[1])
torch.nn.init.zeros_(model.bias)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a write beyond it fails like one on a full disk
try:
    granet.save(model, sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a"
    run = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True)
    assert "a cannot be written: File too large; what was there is untouched" in run.stdout
    assert granet.load(path)["bias"].any() and list(tmp_path.iterdir()) == [path]


MEMORY = """
import resource, sys, torch, granet
with torch.no_grad():
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(48)])  # 201 MB
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for density in (1, 0.1):
        for layer in model:
            layer.weight.mul_(torch.rand(1024, 1024) < density)
        granet.save(model, sys.argv[1])
        granet.load(sys.argv[1], into=model)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def test_saving_and_loading_take_the_memory_of_a_few_layers(tmp_path):
    command = [sys.executable, "-c", MEMORY, tmp_path / "a"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert max(map(int, run.stdout.split())) < 60_000  # KB; a second copy of the model would be 201,000


def test_two_tensors_do_not_share_a_name_in_the_file():
    weight = torch.zeros(100, 100)
    with pytest.raises(ValueError, match="two tensors would both be stored as 'a:where'"):
        granet.pack({"a": weight, "a:where": torch.ones(3)})
