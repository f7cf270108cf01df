import gzip
import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from granet.train.catalog import DATASETS, DEBIAN_FASHION_MNIST
from granet.train.data import load


def idx(array: np.ndarray) -> bytes:
    """The IDX format: two zero bytes, the type (8: unsigned byte), the number of dimensions, their sizes, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def python2_pickle(data: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """The opcodes of the official CIFAR archive, which Python 2 wrote with NumPy 1 (protocol 2)."""
    rows, columns = data.shape
    string = lambda text: b"U" + bytes([len(text)]) + text  # noqa: E731 (an opcode)
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01"
    array += b"M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<I", data.size) + data.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(key) + numbers + b"u."


def write_fashion_mnist(folder: Path, *, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8), np.arange(60, dtype=np.uint8) % 10
    for part, n in (("train", 60), ("t10k", 20)):
        for name, array in ((f"{part}-images-idx3-ubyte", images[:n]), (f"{part}-labels-idx1-ubyte", labels[:n])):
            content = idx(array)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return images, labels


def write_cifar10(folder: Path, *, pickled=python2_pickle) -> np.ndarray:
    folder.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    for rows, name in zip(data, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], strict=True):
        (folder / name).write_bytes(pickled(rows, [i % 10 for i in range(20)], b"labels"))
    return data.reshape(6, 20, 3, 32, 32)


def python3_pickle(data: np.ndarray, labels: list[int], key: bytes) -> bytes:
    return pickle.dumps({b"data": data, key: labels, b"batch_label": b"a batch"}, protocol=2)


def same_images(*splits) -> set[bytes]:
    return {image.numpy().tobytes() for split in splits for image in split.images}


def test_digits_have_a_fixed_stratified_test_set():
    a, b = load("digits", validation=0.1, seed=0), load("digits", validation=100, seed=1)
    assert torch.equal(a.test.images, b.test.images) and len(a.test) == 360 and len(b.validation) == 100
    assert a.test.labels.bincount().tolist() == pytest.approx([36] * 10, abs=1)
    assert a.test.images.dtype == torch.uint8 and a.test.labels.dtype == torch.int64
    assert same_images(a.train, a.validation, a.test) == same_images(b.train, b.validation, b.test)
    pixels = torch.cat([a.train.images, a.validation.images, a.test.images]) / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((a.mean[0], a.std[0]), abs=2e-4)


def test_validation_is_held_out_by_seed_and_in_proportion():
    first, again, other = (load("digits", validation=0.2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert len(first.train) + len(first.validation) == 1797 - 360
    assert len(same_images(first.train, first.validation)) == len(same_images(first.train)) + len(
        same_images(first.validation)
    )
    share = first.validation.labels.bincount() / (first.validation.labels.bincount() + first.train.labels.bincount())
    assert share.tolist() == pytest.approx([0.2] * 10, abs=0.01)
    assert len(load("digits", validation=0).validation) == 0


@pytest.mark.parametrize("validation", [-1, -0.1, 1.0, 1437, True, 2.5])
def test_a_validation_that_does_not_fit_is_refused(validation):
    with pytest.raises(ValueError, match="validation is a count below 1437"):
        load("digits", validation=validation)


def test_a_share_that_holds_out_nothing_is_refused():
    with pytest.raises(ValueError, match=r"validation=0\.0001 of 1437 images is none"):
        load("digits", validation=0.0001)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw", "."])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, packed, folder):
    images, labels = write_fashion_mnist(tmp_path / "data" / folder, packed=packed)
    data = load("fashion-mnist", root=tmp_path / "data", validation=0)
    assert np.array_equal(data.train.images[:, 0].numpy(), images) and np.array_equal(data.train.labels.numpy(), labels)
    assert data.test.images.shape == (20, 1, 28, 28)


@pytest.mark.parametrize("pickled", [python2_pickle, python3_pickle])
def test_cifar10_is_read_from_the_official_archive(tmp_path, pickled):
    images = write_cifar10(tmp_path / "cifar-10-batches-py", pickled=pickled)
    data = load("cifar10", root=tmp_path, validation=0)
    assert np.array_equal(data.train.images.numpy(), images[:5].reshape(100, 3, 32, 32))
    assert np.array_equal(data.test.images.numpy(), images[5])
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


def test_cifar100_takes_the_fine_labels(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = np.zeros((100, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(python2_pickle(data, list(range(100)), b"fine_labels"))
    monkeypatch.setenv("GRANET_DATA", str(tmp_path))
    assert load("cifar100", validation=10).test.labels.tolist() == list(range(100))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    file, mark = tmp_path / "cifar-10-batches-py" / "data_batch_2", tmp_path / "mark"
    file.write_bytes(pickle.dumps({b"data": Payload(mark), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_2 is no intact file.*which no CIFAR file needs"):
        load("cifar10", root=tmp_path, validation=0)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()  # it would have been


@pytest.mark.parametrize("keep", [0, 1, 40, 200, 5000, -1])
def test_a_cifar_file_cut_short_is_named(tmp_path, keep):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load("cifar10", root=tmp_path, validation=0)


@pytest.mark.parametrize("pickled", [
    {b"labels": [0]}, {b"data": np.zeros((1, 3072), np.uint8)}, [1], {b"data": np.zeros((1, 3072)), b"labels": [0]},
    {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
])  # fmt: skip
def test_a_cifar_file_of_other_content_is_named(tmp_path, pickled):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(pickle.dumps(pickled, protocol=2))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load("cifar10", root=tmp_path, validation=0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [0, 3, 12, 2000, -1])
def test_an_idx_file_cut_short_is_named(tmp_path, packed, keep):
    write_fashion_mnist(tmp_path / "fashion-mnist", packed=packed)
    file = tmp_path / "fashion-mnist" / ("train-images-idx3-ubyte" + (".gz" if packed else ""))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load("fashion-mnist", root=tmp_path, validation=0)


def peak(work) -> int:
    """Bytes that Python objects and arrays take at most while ``work`` is done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([0x0803, 4_000_000, 28, 28], "the most"),
        ([0x0803, 40, 280, 28], "the most"),
        ([0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1], "the most"),
        ([0x0803, 40, 28, 28], "has more"),
        ([0x0803, 60_000, 28, 28], "is damaged or cut short|only"),
    ],
)
def test_a_packed_file_is_not_unpacked_beyond_its_images(tmp_path, header, says):
    write_fashion_mnist(tmp_path / "fashion-mnist", packed=True)
    file = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz"
    rest = 1_000_000 if "short" in says else 300_000_000
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(np.array(header, dtype=">u4").tobytes())
        for _ in range(rest // 1_000_000):
            out.write(bytes(1_000_000))

    def read():
        with pytest.raises(ValueError, match=says):
            load("fashion-mnist", root=tmp_path, validation=0)

    assert peak(read) < 100_000_000


class Huge:
    """Pickled, an array that says of itself that it has a terabyte."""

    def __reduce__(self):
        return np.ndarray, ((10**12,), "u1")


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": Huge(), b"labels": []}),
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"),  # so many bytes follow, it says
        b"\x80\x02]" + b"]" * 100_000 + b"a" * 100_000 + b".",
    ],
    ids=["array", "bytes", "nested"],
)
def test_a_pickle_that_asks_for_too_much_is_named(tmp_path, content):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load("cifar10", root=tmp_path, validation=0)


def test_a_file_larger_than_any_of_cifar_is_not_read(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    os.truncate(file, 10**12)  # a hole in a file takes no room
    with pytest.raises(ValueError, match=r"data_batch_1 .*1,000,000,000,000 bytes"):
        load("cifar10", root=tmp_path, validation=0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar10", ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "{root}/cifar-10-batches-py"]),
        ("cifar100", ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "{root}/cifar-100-python"]),
        ("imagenet", ["ILSVRC2012_img_train.tar", "{root}/imagenet/train/<class>"]),
    ],
)
def test_a_missing_dataset_is_explained(tmp_path, name, says):
    with pytest.raises(FileNotFoundError) as error:
        load(name, root=tmp_path, validation=0)
    for words in says:
        assert words.format(root=tmp_path) in str(error.value)
    assert DATASETS[name].locate(tmp_path) is None


def test_fashion_mnist_is_explained_with_its_debian_package():
    assert "apt-get install dataset-fashion-mnist" in DATASETS["fashion-mnist"].advice


def test_a_missing_file_is_named(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    write_fashion_mnist(tmp_path / "fashion-mnist", packed=True)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    (tmp_path / "fashion-mnist" / "train-labels-idx1-ubyte.gz").unlink()
    for name, file in (("cifar10", "data_batch_3"), ("fashion-mnist", "train-labels-idx1-ubyte")):
        with pytest.raises(FileNotFoundError, match=file):
            load(name, root=tmp_path, validation=0)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown dataset.*did you mean 'cifar10'"):
        load("cifar-10", validation=0)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_real_fashion_mnist(tmp_path):
    data = load("fashion-mnist", root=tmp_path, validation=5000)
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.validation.labels.bincount().tolist() == [500] * 10
    pixels = torch.cat([data.train.images, data.validation.images]) / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((data.mean[0], data.std[0]), abs=1e-4)


def write_image_folder(root: Path) -> None:
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("n01", "n02")):
            (root / "imagenet" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB" if i else "L", (300 + i, 260), (40 * label, 10 * i, 0) if i else 7)
                image.save(root / "imagenet" / part / name / f"{i}.JPEG")


def test_an_image_folder_is_listed_by_class(tmp_path):
    write_image_folder(tmp_path)
    data = load("imagenet", root=tmp_path, validation=2)
    assert data.classes == 2
    assert data.validation.labels.tolist() == [0, 1] and data.test.labels.tolist() == [0, 0, 1, 1]
    assert [Path(file).parts[-3:] for file in data.test.files][:2] == [
        ("val", "n01", "0.JPEG"),
        ("val", "n01", "1.JPEG"),
    ]


def test_an_image_folder_without_a_class_is_refused(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "imagenet" / "train" / "n03").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val must hold one folder of images a class; missing: \['n03'\]"):
        load("imagenet", root=tmp_path, validation=2)
