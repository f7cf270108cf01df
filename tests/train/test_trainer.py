import math

import pytest
import torch
import torch.nn.functional as F

from granet import native
from granet.engine import timing
from granet.sparsifier.sparse_storage import linear
from granet.train import data, models
from granet.train.optimizer import learning_rate
from granet.train.recipe import Train, validate
from granet.train.trainer import Trainer, TrainingError

GRANET = {"name": "granet", "sparsity": 0.9, "end": "50%", "interval": "10it"}


def recipe(model="mlp", method=GRANET, seed=0, **train):
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu"} | train
    values = {"data": {"name": "digits"}, "model": {"name": model}, "method": method, "train": settings, "seed": seed}
    return validate(values, source="test")


def fit(trainer, **options):
    records = []
    trainer.fit(record=records.append, save=options.pop("save", lambda: None), **options)
    return records


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_dense_training_is_the_plain_loop_to_the_bit():
    trainer = Trainer(recipe("digits-cnn", {"name": "dense"}, nesterov=True, schedule="constant", weight_decay=0.01))
    fit(trainer)

    torch.manual_seed(0)
    digits = data.load("digits", validation=0.1, seed=0)
    model = models.build("digits-cnn", classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    for x, y in data.epoch_batches(
        digits.train, batch_size=64, train=True, mean=digits.mean, std=digits.std, seed=0, epoch=0, drop_last=True
    ):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(model.state_dict(), weights(trainer))


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_the_last_smaller_batch_of_an_epoch_is_trained_on_where_asked(accumulate):
    """Of 1,293 images 20 batches have 64 and the last has 13: with all of them, two epochs are 42 steps."""
    settings = {"epochs": 2, "schedule": "constant", "lr": 0.01, "partial_batch": True, "log": 1}
    trainer = Trainer(recipe("mlp", {"name": "dense"}, accumulate=accumulate, **settings))
    assert trainer.steps == 42 and Trainer(recipe(epochs=2)).steps == 40
    accuracies = [record["accuracy"] for record in fit(trainer) if record["kind"] == "train"]
    assert len(accuracies) == 42
    assert 13 * accuracies[20] == pytest.approx(round(13 * accuracies[20]), abs=1e-4)
    assert trainer.summary()["flops"]["training"] == trainer.flops.training_step() * 1293 * 2
    assert trainer.summary()["flops"]["training_dense"] == trainer.flops.training_step() * 1293 * 2

    torch.manual_seed(0)
    digits = data.load("digits", validation=0.1, seed=0)
    model = models.build("mlp", classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    options = {"batch_size": 64, "train": True, "mean": digits.mean, "std": digits.std}
    for epoch in range(2):
        for x, y in data.epoch_batches(digits.train, epoch=epoch, **options):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    if accumulate == 1:
        assert equal(model.state_dict(), weights(trainer))
    torch.testing.assert_close(weights(trainer), dict(model.state_dict()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stopped", [20, 21, 30])
def test_a_run_goes_on_to_the_bit_around_a_smaller_batch(stopped):
    whole, first, second = (Trainer(recipe(epochs=2, lr=0.01, partial_batch=True)) for _ in range(3))
    fit(whole)
    assert not first.fit(record=lambda _: None, save=lambda: None, stop=lambda: first.step == stopped)
    second.load_state_dict(weights(first), first.state_dict())
    fit(second)
    assert second.step == 42 and equal(weights(whole), weights(second))
    assert second.training_flops == whole.training_flops


def test_schedules_of_the_learning_rate():
    cosine = Train(lr=2.0, schedule="cosine", warmup=2)
    assert [round(learning_rate(cosine, step, 10), 4) for step in (0, 1, 2, 6, 10)] == [1.0, 2.0, 2.0, 1.0, 0.0]
    assert learning_rate(Train(lr=0.3, schedule="constant", warmup=4), 1, 10) == pytest.approx(0.15)
    assert learning_rate(Train(lr=0.3, schedule="constant", warmup=4), 7, 10) == 0.3


def test_what_lies_behind_the_end_of_training_is_warned_of(caplog):
    late = recipe(milestones=["1ep", "90ep", 7], keep=["50%", "30it"], warmup="2ep")
    Trainer(late)
    end = "the training (1 epochs, 20 steps)"
    assert caplog.messages == [
        f"train.keep: 30it is after the end of {end} and has no effect",
        f"train.milestones: 90ep is after the end of {end} and has no effect",
        f"train.warmup: 2ep is longer than {end}: its lr of 0.05 is never reached",
    ]
    caplog.clear()
    Trainer(recipe(milestones=["90ep"], schedule="cosine", warmup="1ep"))
    assert caplog.messages == []


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_without_its_arithmetic_is_warned_of(caplog, monkeypatch, emulated):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not emulated)  # another processor
    Trainer(recipe())
    assert caplog.messages == []
    Trainer(recipe(bf16=True))
    assert ["there is no bfloat16 arithmetic here" in text for text in caplog.messages] == [True] * emulated


def test_a_quick_look_ends_early_with_the_schedules_of_the_whole_training(caplog):
    whole, look = Trainer(recipe(epochs=3)), Trainer(recipe(epochs=3, max_steps=5, evaluate_images=70))
    assert "at most 70 images" in caplog.text
    records = []
    assert look.fit(record=records.append, save=lambda: None)
    assert look.step == 5 and look.steps == whole.steps > 5
    whole.train_until(5)
    assert equal(weights(whole), weights(look))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [5]
    assert look.summary()["evaluate_images"] == 70
    counted = sum(len(y) for _, y in look.images.once("test", 70))
    assert counted == 70 and look.evaluate("test").accuracy * 70 == pytest.approx(
        round(look.evaluate("test").accuracy * 70)
    )
    caplog.clear()
    Trainer(recipe(epochs=1, max_steps=10_000))
    assert "train.max_steps: 10,000 is not before the end of the training" in caplog.text


def test_the_optimizer_takes_the_learning_rate_of_each_step():
    trainer = Trainer(recipe(schedule="multistep", milestones=["5it"], gamma=0.5, log=1))
    rates = [record["lr"] for record in fit(trainer) if record["kind"] == "train"]
    assert rates == [0.05] * 5 + [0.025] * 15
    assert trainer.optimizer.param_groups[0]["lr"] == 0.025


def test_accumulating_gradients_changes_rounding_only():
    whole, parts = (Trainer(recipe(accumulate=n, lr=0.01, schedule="constant")) for n in (1, 4))
    a, b = ([r for r in fit(t, stop=lambda t=t: t.step == 5) if r["kind"] == "train"] for t in (whole, parts))
    assert a == b == []
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-3, atol=1e-5)
    assert not equal(weights(whole), weights(parts))


def test_clipping_bounds_the_step():
    trainer = Trainer(
        recipe(clip_norm=0.01, momentum=0, lr=1.0, weight_decay=0, method={"name": "static", "sparsity": 0.5})
    )
    before = weights(trainer)
    fit(trainer, stop=lambda: trainer.step == 1)
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights(trainer).items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_moving_average_stays_sparse_and_is_what_is_evaluated():
    trainer = Trainer(recipe(ema=0.9))
    fit(trainer)
    averaged = dict(trainer.ema.named_parameters())
    for name, mask in trainer.sparsifier.masks.items():
        assert not averaged[name][~mask].any()
        assert averaged[name][mask].any()
    score = trainer.evaluate("validation")
    trainer.model.load_state_dict(trainer.ema.state_dict())
    trainer.ema = None
    assert trainer.evaluate("validation") == score


def test_bfloat16_leaves_the_weights_in_float32():
    plain, half = Trainer(recipe()), Trainer(recipe(bf16=True))
    losses = [[r["loss"] for r in fit(t) if r["kind"] == "train"] for t in (plain, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_channels_last_is_the_layout_of_weights_and_masks():
    trainer = Trainer(recipe("digits-cnn", channels_last=True))
    fit(trainer, stop=lambda: trainer.step == 12)
    weight = trainer.model.features[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert trainer.optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()
    assert trainer.sparsifier.version == 1


def test_label_smoothing_enters_the_training_loss_alone():
    trainer = Trainer(recipe(label_smoothing=0.2, log=1))
    x, y = next(trainer.images.epoch_from(trainer.step))
    expected = F.cross_entropy(trainer.model(x), y, label_smoothing=0.2).item()
    plain = Trainer(recipe()).evaluate("validation")
    assert trainer.evaluate("validation") == plain
    assert fit(trainer, stop=lambda: trainer.step == 1)[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_weight_decay_can_spare_vectors():
    groups = Trainer(recipe("digits-cnn", decay="weights", weight_decay=0.1)).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == 13


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # torch's own, as it loads its compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="on the processor, compiling takes most of a minute")
def test_on_a_gpu_with_a_compiled_forward():
    settings = {"device": "cuda", "log": 1}
    plain, compiled = Trainer(recipe(**settings)), Trainer(recipe(compile="default", **settings))
    losses = [[r["loss"] for r in fit(trainer) if r["kind"] == "train"] for trainer in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_records_are_complete_and_in_order():
    trainer = Trainer(recipe(epochs=2, log="5it", evaluate="10it"))
    records = fit(trainer)
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "eval", "update")}
    assert [r["step"] for r in kinds["train"]] == list(range(5, 41, 5))
    assert [r["step"] for r in kinds["eval"]] == [10, 20, 30, 40]
    assert [r["step"] for r in kinds["update"]] == [10, 20, 30]
    assert set(kinds["train"][0]) == {"kind", "step", "epoch", "loss", "accuracy", "lr", "sparsity"}
    assert set(kinds["eval"][0]) == {
        "kind", "step", "epoch", "split", "loss", "accuracy", "sparsity", "realised_sparsity", "eligible", "seconds"
    }  # fmt: skip
    update = kinds["update"][0]
    assert update["epoch"] == 0.5
    assert sum(update["active"].values()) == round((1 - update["sparsity"]) * trainer.sparsifier.total)
    assert update["active"].keys() == update["grown"].keys() == update["dropped"].keys()
    assert sum(update["dropped"].values()) > sum(update["grown"].values()) > 0
    assert update["regeneration"] == trainer.sparsifier.method.regeneration_at(10)
    assert [r["realised_sparsity"] >= r["sparsity"] - 1e-9 for r in kinds["eval"]] == [True] * 4
    # the mean over the steps since the last line, at the step that the line names
    assert kinds["train"][-1]["accuracy"] > kinds["train"][0]["accuracy"]


def test_only_evaluations_at_target_sparsity_count_and_the_test_set_is_left_alone():
    trainer = Trainer(recipe(epochs=3, evaluate="10it"))
    trainer.splits["test"] = None
    saved = []
    records = fit(trainer, save=lambda: saved.append(trainer.step))
    evals = [r for r in records if r["kind"] == "eval"]
    assert [r["eligible"] for r in evals] == [r["step"] >= 30 for r in evals]
    best = max((r for r in evals if r["eligible"]), key=lambda r: (r["accuracy"], -r["loss"]))
    assert (trainer.best.step, trainer.best.accuracy) == (best["step"], best["accuracy"])
    assert {20, 40, 60, trainer.best.step} <= set(saved)
    assert trainer.sparsifier.active == trainer.target


EVERY_FIVE = {"sparsity": 0.8, "interval": 5, "distribution": "uniform"}


@pytest.mark.parametrize(
    ("method", "settings", "gradients"),  # how many of the 20 steps need the gradient of inactive weights
    [
        ("dense", {}, 0),
        ("static", {"sparsity": 0.8}, 0),
        ("rigl", {"sparsity": 0.8, "end": 15, "interval": 5}, 2),
        ("rigl", {**EVERY_FIVE, "end": 15, "accumulate": 3}, 6),
        ("rigl", {**EVERY_FIVE, "end": 15, "growth": "momentum"}, 10),
        ("rigl", {**EVERY_FIVE, "end": 15, "growth": "random"}, 0),
        ("rigl-itop", EVERY_FIVE, 3),
        ("set", EVERY_FIVE, 0),
        ("mest", {**EVERY_FIVE, "halve": 5, "end": 15, "gradient_weight": 0.1}, 0),  # that of active weights alone
        ("deep-r", {"sparsity": 0.8}, 0),
    ],
)
def test_training_flops_are_counted_by_the_formulas(method, settings, gradients):
    trainer = Trainer(recipe(method={"name": method, **settings}))
    sparse, dense = trainer.flops.inference(trainer.sparsifier.counts), trainer.flops.inference()
    fit(trainer)
    expected = 64 * ((20 - gradients) * 3 * sparse + gradients * (2 * sparse + dense))
    assert trainer.training_flops == pytest.approx(expected)
    assert trainer.summary()["flops"]["training_dense"] == pytest.approx(64 * 20 * 3 * dense)


@pytest.mark.parametrize(
    ("method", "settings", "gathered", "different"),
    [
        ("ac-dc", {"sparsity": 0.8, "begin": 4, "interval": 3, "end": 14}, 0, 2),
        ("snfs", EVERY_FIVE, 15, 4),
        ("mest", {**EVERY_FIVE, "halve": 5, "end": 15, "drop_fraction": 0.5, "soft_bound": True}, 0, 3),
    ],
)
def test_training_flops_follow_what_the_network_holds(method, settings, gathered, different):
    """AC/DC: dense phases cost 3 f_D. SNFS: 2 f_S + f_D in every step to the last update, whatever layers then hold."""
    trainer = Trainer(recipe("digits-cnn", {"name": method, **settings}))
    held = [trainer.flops.inference(trainer.sparsifier.counts)]  # by the network in each step

    def watch():
        held.append(trainer.flops.inference(trainer.sparsifier.counts))
        return False

    fit(trainer, stop=watch)
    dense = trainer.flops.inference()
    expected = sum(2 * f + dense if step <= gathered else 3 * f for step, f in enumerate(held[:20], 1))
    assert trainer.training_flops == pytest.approx(64 * expected)
    assert len({round(f) for f in held[:20]}) == different


def test_the_summary_adds_up():
    trainer = Trainer(recipe())
    fit(trainer)
    summary = trainer.summary()
    assert summary["parameters"] == {"total": 266_610, "sparse": 266_200, "active": 26_620 + 410}
    assert summary["sparsity"] == summary["target_sparsity"] == pytest.approx(0.9)
    assert [layer["active"] for layer in summary["layers"]] == list(trainer.sparsifier.counts.values())
    assert sum(layer["flops"] for layer in summary["layers"]) == pytest.approx(summary["flops"]["inference"])
    assert summary["flops"]["inference"] / summary["flops"]["inference_dense"] == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_training_and_is_not_saved():
    trainer = Trainer(recipe(lr=1e18, schedule="constant", log=20, checkpoint=1))
    saved = []
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step (\d+);.*lower train\.lr") as error:
        fit(trainer, save=lambda: saved.append(trainer.step))
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    assert saved == list(range(1, step))


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize(
    "train", [{"momentum": 0.9}, {"optimizer": "adamw", "lr": 0.002, "ema": 0.9, "clip_norm": 1.0}]
)
def test_a_trainer_goes_on_from_its_state_to_the_bit(train, storage):
    settings = recipe("digits-cnn", epochs=1, log=3, batch_size=32, accumulate=2, storage=storage, **train)
    whole = Trainer(settings)
    records = fit(whole)
    first = Trainer(settings)
    before = []
    assert first.fit(record=before.append, save=lambda: None, stop=lambda: first.step == 17) is False
    second = Trainer(settings)
    second.load_state_dict(weights(first), first.state_dict())
    before += fit(second)
    for record in [*records, *before]:
        record.pop("seconds", None)
    assert before == records
    assert equal(weights(whole), weights(second))
    assert equal(whole.sparsifier.masks, second.sparsifier.masks)
    assert whole.training_flops == second.training_flops


def test_a_state_of_another_recipe_is_refused():
    trainer = Trainer(recipe())
    other = Trainer(recipe("digits-cnn"))
    with pytest.raises(ValueError, match="does not fit this recipe"):
        other.load_state_dict(weights(trainer), trainer.state_dict())
    static = Trainer(recipe(method={"name": "static", "sparsity": 0.9}))
    with pytest.raises(ValueError, match="the state is of GraNet"):
        static.load_state_dict(weights(trainer), trainer.state_dict())


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"batch_size": 2000}, "batch_size 2000 is larger than the training set, 1293 images"),
        ({"log": 0}, "train.log: 0 is less than a step"),
        ({"evaluate": "0.01%"}, "train.evaluate: '0.01%' is less than a step"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "cuda:9"}, "no GPU|invalid"),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(train, says):
    with pytest.raises(ValueError, match=says):
        Trainer(recipe(**train))


def test_parameters_can_be_kept_dense():
    values = recipe().model_dump()
    values["model"]["keep_dense"] = ["2.weight"]
    trainer = Trainer(validate(values, source="test"))
    assert len(trainer.sparsifier.masks) == 2
    assert "2.weight" not in trainer.sparsifier.masks
    assert math.isclose(trainer.target / trainer.sparsifier.total, 0.1, rel_tol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_sparse_engine_trains_the_same_network_up_to_rounding(bf16, monkeypatch):
    if not native.available():
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(timing, "NOISE", -1e9)  # layers run sparse whatever the measurement says
    settings = {"seed": 1, "bf16": bf16}
    dense, sparse = (Trainer(recipe("mlp", engine=engine, **settings)) for engine in ("dense", "sparse"))
    lines = [fit(trainer) for trainer in (dense, sparse)]
    report = sparse.engine.report()
    assert report.setting.startswith("bfloat16 autocast" if bf16 else "float32") and dense.engine is None
    assert any(row.chosen == "sparse" for row in report.layers)
    assert sparse.sparsifier.active == dense.sparsifier.active
    losses = [[line["loss"] for line in each if line["kind"] == "eval"] for each in lines]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_the_sparse_engine_does_not_go_with_compile():
    with pytest.raises(ValueError, match=r"kernels of its own.*: leave out compile"):
        recipe(engine="sparse", compile="default")


@pytest.mark.parametrize("train", [{"decay": "weights"}, {"optimizer": "adamw", "lr": 0.002, "ema": 0.9, "bf16": True}])
def test_sparse_storage_trains_what_dense_storage_trains(train, monkeypatch):
    monkeypatch.setattr(linear, "DENSEST", {})  # to the bit on torch's own kernels
    dense, sparse = (Trainer(recipe("digits-cnn", storage=storage, **train)) for storage in ("dense", "sparse"))
    records = [fit(one) for one in (dense, sparse)]
    held = [sum(p.numel() for p in one.model.parameters()) for one in (dense, sparse)]
    assert held[1] < 0.2 * held[0]
    assert equal(dense.sparsifier.masks, sparse.sparsifier.masks)
    assert equal(weights(dense), weights(sparse))
    for record in [*records[0], *records[1]]:
        record.pop("seconds", None)
    assert records[0] == records[1]
    a, b = dense.summary(), sparse.summary()
    assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize("other", [{"engine": "sparse"}, {"quantise": "int8"}, {"compile": "default"}])
def test_sparse_storage_goes_with_torchs_own_kernels_alone(other):
    with pytest.raises(ValueError, match="storage sparse has kernels of its own"):
        recipe(storage="sparse", **other)
