import pytest
import torch
from torch import nn

import granet
from granet.sparsifier import masking, stepping

timm = pytest.importorskip("timm", reason='needs pip install "granet[timm]"')

from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402  after the skip
from timm.utils import ModelEmaV3, NativeScaler  # noqa: E402

STEPS = 12
METHOD = granet.GraNet(sparsity=0.8, initial_sparsity=0.3, end=6, total=12, interval=2)


@pytest.fixture(scope="module")
def batches(problem):
    images = nn.functional.interpolate(problem.x.view(-1, 1, 8, 8), scale_factor=4)  # 32x32
    return [(images[i : i + 8], problem.y[i : i + 8]) for i in range(0, 8 * STEPS, 8)]


def make(seed=7):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", in_chans=1, num_classes=10)
    sparsifier = granet.Sparsifier(model, METHOD, seed=seed)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def script(
    batches, *, clip=None, mode="norm", poison=None, stop=STEPS, load=None, accumulate=1, autocast=None, backend=None
):
    """The inner loop of timm's training script: autocast, scaler, accumulation, clipping, average of weights."""
    model, sparsifier, optimizer = make()
    scaler, average = NativeScaler("cpu"), ModelEmaV3(model, decay=0.9)
    sparsifier.follow(average)
    parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier, "scaler": scaler, "average": average}
    for name, part in parts.items():
        if load:
            part.load_state_dict(load[name])
    task = torch.compile(model, backend=backend) if backend else model
    for i, (x, y) in enumerate(batches[:stop]):
        if i < sparsifier.step:
            continue
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(task(x), y) * (float("inf") if i == poison else 1.0)
        update = (i + 1) % accumulate == 0
        clipping = {"clip_grad": clip, "clip_mode": mode, "parameters": model.parameters()}
        scaler(loss / accumulate, optimizer, need_update=update, **clipping)
        if update:
            optimizer.zero_grad()
            average.update(model, step=i)
    return parts


def plain(batches, clip=lambda model: None, accumulate=1, autocast=None):
    model, sparsifier, optimizer = make()
    for i, (x, y) in enumerate(batches):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(model(x), y) / accumulate
        loss.backward()
        if (i + 1) % accumulate == 0:
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
    return model, sparsifier


def test_equals_the_plain_loop(batches, same):
    parts = script(batches)
    same(parts["model"], parts["sparsifier"], *plain(batches))


def test_accumulation_equals_the_plain_loop(batches, same):
    parts = script(batches, accumulate=2)
    same(parts["model"], parts["sparsifier"], *plain(batches, accumulate=2), updates=2)
    assert parts["sparsifier"].step == STEPS // 2


def test_autocast_equals_the_plain_loop(batches, same):
    parts = script(batches, autocast=torch.bfloat16)
    same(parts["model"], parts["sparsifier"], *plain(batches, autocast=torch.bfloat16))


def test_compiled_equals_the_plain_loop(batches, same, compiles):
    parts = script(batches, backend=compiles)
    same(parts["model"], parts["sparsifier"], *plain(batches))


def test_the_average_is_as_sparse_as_the_model(batches):
    parts = script(batches)
    averaged = {name.removeprefix("module."): p for name, p in parts["average"].named_parameters()}
    for name, mask in parts["sparsifier"].masks.items():
        assert not averaged[name][~mask].any() and averaged[name][mask].all()


def test_resume_is_bitwise(batches, same, tmp_path):
    whole = script(batches)
    half = script(batches, stop=5)
    saved = {name: part.state_dict() for name, part in half.items()}
    torch.save(saved, tmp_path / "saved.pt")
    resumed = script(batches, load=torch.load(tmp_path / "saved.pt", weights_only=True))
    same(resumed["model"], resumed["sparsifier"], whole["model"], whole["sparsifier"])
    for mine, theirs in zip(resumed["average"].parameters(), whole["average"].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("mode", ["norm", "agc"])
def test_timm_clips_by_dense_gradients(mode, batches, same):
    parts = script(batches, clip=0.02, mode=mode)
    clipped = plain(batches, lambda model: timm.utils.dispatch_clip_grad(model.parameters(), 0.02, mode))
    same(parts["model"], parts["sparsifier"], *clipped)
    assert not torch.equal(parts["model"].conv_stem.weight, plain(batches)[0].conv_stem.weight)


def test_live_gradients_are_clipped_before_the_scaler_steps(batches, same):
    model, sparsifier, optimizer = make()
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
        dense = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        live = sparsifier.clip_grad_norm_(0.02)
        optimizer.step()
        optimizer.zero_grad()
    assert live < 0.9 * dense  # what the dense norm would have clipped too hard


def test_a_step_that_the_scaler_skips_is_not_counted(batches):
    parts = script(batches, poison=4)
    assert parts["sparsifier"].step == STEPS - 1
    assert all(p.isfinite().all() for p in parts["model"].parameters())


# adahessian differentiates the gradients once more, which it cannot when they were masked in place; fused ones need
# apex, and those of bitsandbytes are in tests/sparsifier/test_quantised.py
@pytest.mark.parametrize("name", list_optimizers(exclude_filters=("fused*", "bnb*", "adahessian")))
def test_inactive_weights_and_what_is_remembered_of_them_are_zero(name, problem, eager):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    sparsifier = granet.Sparsifier(model, granet.SET(sparsity=0.7, total=8, interval=2))
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3)
    sparsifier.attach(optimizer)
    for x, y in list(problem.loader())[:6]:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for key, p in model.named_parameters():
            if key in sparsifier.masks:
                held = [p.detach(), *stepping.buffers([optimizer], p)]
                assert not masking.leaks([(sparsifier.masks[key], held)]), key
    assert sparsifier.version == 3
