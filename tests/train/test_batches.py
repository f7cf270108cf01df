import time

import numpy as np
import pytest
import torch
from PIL import Image

from granet.train.batches import Augment, FolderSplit, Split, epoch_batches, steps_per_epoch

N = 23
MEAN, STD = (0.0,) * 3, (1 / 255,) * 3  # so that normalised pixels are the bytes


def numbered(n: int = N, side: int = 6) -> Split:
    """Images whose pixels all differ, so that every shift is seen."""
    images = torch.arange(n * 3 * side * side).remainder(251).to(torch.uint8).view(n, 3, side, side)
    return Split(images, torch.arange(n))


def batches(split=None, **options):
    options = {"batch_size": 4, "train": True, "mean": MEAN, "std": STD} | options
    return list(epoch_batches(numbered() if split is None else split, **options))


def labels(given) -> list[int]:
    return [label for _, y in given for label in y.tolist()]


def assert_same(a, b):
    assert len(a) == len(b)
    for (x, y), (u, v) in zip(a, b, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


EVERYTHING = Augment(crop=2, flip=True, cutout=3)


@pytest.mark.parametrize("start", range(8))
def test_an_epoch_goes_on_from_any_batch(start):
    whole = batches(augment=EVERYTHING, seed=5, epoch=2)
    torch.rand(start + 1)  # the global generator has no say
    assert_same(batches(augment=EVERYTHING, seed=5, epoch=2, start=start), whole[start:])


def test_every_epoch_and_seed_has_its_own_order_and_shifts():
    orders = [labels(batches(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    a, b = (dict(zip(labels(given), torch.cat([x for x, _ in given]), strict=True)) for given in (
        batches(augment=EVERYTHING, epoch=0), batches(augment=EVERYTHING, epoch=1)
    ))  # fmt: skip
    assert sum(torch.equal(a[i], b[i]) for i in range(N)) < N / 2


def test_evaluation_takes_every_image_once_in_order_as_it_is():
    split = numbered()
    given = batches(split, train=False, augment=EVERYTHING)
    assert labels(given) == list(range(N))
    assert torch.equal(torch.cat([x for x, _ in given]), split.images.float())


def test_pixels_are_normalised_by_channel():
    split, mean, std = numbered(), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    ((x, _),) = batches(split, batch_size=N, train=False, mean=mean, std=std)
    expected = (split.images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def windows(image: np.ndarray, augment: Augment) -> list[bytes]:
    """Every image that cropping and flipping may give, made plainly."""
    pad, side = augment.crop, image.shape[1]
    mode = {"reflect": "reflect", "zeros": "constant"}[augment.padding]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode=mode)
    cut = [padded[:, i : i + side, j : j + side] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    return [part.tobytes() for part in cut] + [part[:, :, ::-1].tobytes() for part in cut if augment.flip]


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_give_each_window_equally_often(padding, flip):
    augment, image = Augment(crop=1, padding=padding, flip=flip), numbered(1).images
    split = Split(image.expand(4000, -1, -1, -1), torch.zeros(4000, dtype=torch.int64))
    ((x, _),) = batches(split, batch_size=4000, augment=augment)
    expected = windows(image[0].numpy(), augment)
    seen = [part.tobytes() for part in x.to(torch.uint8).numpy()]
    counts = np.array([seen.count(window) for window in expected])
    assert counts.sum() == 4000
    assert abs(counts - 4000 / len(expected)).max() < 5 * (4000 / len(expected)) ** 0.5


def test_cutout_sets_a_square_to_the_mean_colour():
    split = Split(torch.full((500, 3, 8, 8), 200, dtype=torch.uint8), torch.zeros(500, dtype=torch.int64))
    ((x, _),) = batches(split, batch_size=500, augment=Augment(cutout=3))
    cut = (x == 0).all(1)
    assert ((x == 0).any(1) == cut).all()
    sizes = cut.sum((1, 2))
    assert sizes.max() == 9 and sizes.min() == 4  # in a corner less of it is seen
    rows, columns = cut.any(2).sum(1), cut.any(1).sum(1)
    assert torch.equal(rows * columns, sizes)
    assert cut.any(0).all()


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("n", [21, 22, 23, 24])
def test_ranks_share_what_one_process_would_take(drop_last, train, n):
    split, world = numbered(n), 3
    alone = batches(split, batch_size=4 * world, train=train, augment=EVERYTHING, drop_last=drop_last)
    shared = [
        batches(split, train=train, augment=EVERYTHING, rank=rank, world=world, drop_last=drop_last)
        for rank in range(world)
    ]
    if train:
        steps = steps_per_epoch(n, 4, world=world, drop_last=drop_last)
        assert [len(given) for given in shared] == [steps] * world
    for i, (x, y) in enumerate(alone[: len(shared[0])]):
        for rank, given in enumerate(shared):
            if len(y) > rank:
                assert torch.equal(given[i][0], x[rank::world]) and torch.equal(given[i][1], y[rank::world])
    if not (train or drop_last):
        assert sorted(label for given in shared for label in labels(given)) == list(range(n))


@pytest.mark.parametrize(("n", "drop_last", "steps"), [(23, False, 6), (23, True, 5), (24, True, 6), (3, True, 0)])
def test_steps_per_epoch_are_the_batches_given(n, drop_last, steps):
    assert steps_per_epoch(n, 4, drop_last=drop_last) == steps == len(batches(numbered(n), drop_last=drop_last))


def test_the_split_itself_is_never_written_to():
    split = numbered()
    before = split.images.clone()
    batches(split, augment=Augment(crop=2, padding="zeros", flip=True, cutout=4))
    assert torch.equal(split.images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_images():
    for (x, y), (u, v) in zip(batches(augment=EVERYTHING, device="cuda"), batches(augment=EVERYTHING), strict=True):
        assert x.is_cuda and torch.equal(y.cpu(), v)
        torch.testing.assert_close(x.cpu(), u)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"start": -1}, "start >= 0"),
        ({"rank": 2, "world": 2}, "rank < world"),
        ({"augment": Augment(crop=6)}, "crop=6 cannot be reflected in images of 6x6"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)


@pytest.mark.parametrize("options", [{"crop": -1}, {"cutout": -2}, {"padding": "reflected"}])
def test_a_wrong_augmentation_is_refused(options):
    with pytest.raises(ValueError, match="got"):
        Augment(**options)


def test_crop_and_flip_are_fast_enough_for_cifar():
    """10,000 images a second; many times that on an idle core."""
    split = Split(torch.zeros(10_000, 3, 32, 32, dtype=torch.uint8), torch.zeros(10_000, dtype=torch.int64))
    best = float("inf")
    for epoch in range(3):
        began = time.process_time()
        batches(split, batch_size=128, epoch=epoch, augment=Augment(crop=4, flip=True))
        best = min(best, time.process_time() - began)
    assert best < 1


@pytest.fixture
def folder(tmp_path) -> FolderSplit:
    rng = np.random.default_rng(0)
    files = []
    for i in range(10):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (240 + 20 * i, 300, 3), dtype=np.uint8)).save(files[-1])
    return FolderSplit(np.array(files), torch.arange(10))


# from Python 3.12 on, forking workers from a process that has threads (torch's own) warns
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_decoded_alike_by_any_worker_and_from_any_batch(folder, workers):
    options = {"augment": Augment(flip=True, cutout=20), "seed": 1, "epoch": 3}
    whole = batches(folder, workers=0, **options)
    assert [x.shape for x, _ in whole] == [(4, 3, 224, 224), (4, 3, 224, 224), (2, 3, 224, 224)]
    assert_same(batches(folder, workers=workers, start=1, **options), whole[1:])
    assert not torch.equal(batches(folder, workers=0, seed=1, epoch=4)[0][0], whole[0][0])


def test_a_folder_is_evaluated_on_the_centre_of_each_image(folder, tmp_path):
    image = np.zeros((512, 512, 3), dtype=np.uint8)
    image[32:480, 32:480] = 255  # halved, this is the central 224x224 of 256x256
    Image.fromarray(image).save(folder.files[0])
    (x, y), *_ = batches(folder, train=False, workers=0)
    assert y.tolist() == [0, 1, 2, 3]
    assert (x[0, :, 1:-1, 1:-1] == 255).all()


def test_images_that_would_fill_the_memory_are_refused(folder, monkeypatch):
    from PIL import Image

    Image.new("RGB", (1, 20_000)).save(folder.files[0])  # 256x5,120,000 when its shorter side is
    with pytest.raises(ValueError, match=r"no readable image: 1x20000 pixels"):
        batches(folder, train=False, workers=0)
    Image.new("RGB", (300, 300)).save(folder.files[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 3)  # Pillow refuses what has twice as many
    with pytest.raises(ValueError, match=r"no readable image: .*decompression bomb"):
        batches(folder, train=False, workers=0)


def test_a_folder_refuses_what_it_cannot_do(folder, tmp_path):
    with pytest.raises(ValueError, match=r"leave Augment\.crop at 0"):
        batches(folder, augment=Augment(crop=4))
    (tmp_path / "3.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"3\.png is no readable image"):
        batches(folder, workers=0)
