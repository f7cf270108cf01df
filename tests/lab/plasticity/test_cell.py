"""One pruning: masks, values and momentum after it, and what is measured."""

import pytest
import torch

from granet.lab.plasticity.cell import Bench, choose, exchanged, measure, prune, regenerate
from granet.lab.plasticity.study import Cell
from granet.topology import count
from granet.train import checkpoint
from granet.train.optimizer import learning_rate
from granet.train.run import Run, execute


@pytest.fixture(scope="module")
def on(run):
    return Bench(run)


def cell(run, **values):
    settings = {"step": 20, "rate": 0.5, "arm": "none", "scope": "global", "retrain": 20, "batches": 1, "exchange": 0.5}
    return Cell(run=str(run.path), **settings | values)


def state_at(run, step):
    return checkpoint.load(run.checkpoints / f"{step:08d}")


def numbers(result):
    return {key: value for key, value in result.items() if key != "seconds"}


def test_pruning_takes_the_smallest_of_the_active_weights():
    weights = {"a": torch.tensor([[5.0, -4.0, 3.0, 9.0]]), "b": torch.tensor([[-0.1, 0.2, 0.3, 0.4]])}
    masks = {"a": torch.tensor([[True, True, True, False]]), "b": torch.ones(1, 4, dtype=torch.bool)}
    everywhere = prune(masks, weights, 0.5, "global")  # 4 of 7 stay, half up
    assert everywhere["a"].tolist() == [[True, True, True, False]]
    assert everywhere["b"].tolist() == [[False, False, False, True]]
    each = prune(masks, weights, 0.5, "layerwise")
    assert each["a"].tolist() == [[True, True, False, False]]
    assert each["b"].tolist() == [[False, False, True, True]]
    least = prune(masks, weights, 0.98, "global")
    assert [count(mask) for mask in least.values()] == [1, 1]


def test_regeneration_grows_where_the_gradient_is_largest_to_the_number_asked_for():
    kept = {"a": torch.tensor([[True, False, False, False]])}
    before = {"a": torch.tensor([[True, True, True, False]])}
    grown = regenerate(kept, before, {"a": torch.tensor([[9.0, 0.1, -0.2, 0.3]])})
    assert grown["a"].tolist() == [[True, False, True, True]]


def test_further_pruning_gives_up_a_share_of_every_layer():
    weights = {"a": torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0]])}
    masks = {"a": torch.tensor([[True, True, True, True, False]])}
    assert exchanged(masks, weights, 0.5)["a"].tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_the_arms_have_the_densities_they_promise(on, run, scope):
    found = state_at(run, 20)
    before, kept, plain = choose(on, found, cell(run, scope=scope))
    _, kept_restore, restored = choose(on, found, cell(run, arm="restore", scope=scope))
    _, kept_equal, equal = choose(on, found, cell(run, arm="equal", scope=scope))
    for name in before:
        assert count(restored[name]) == count(before[name])
        assert count(equal[name]) == count(plain[name])
        assert count(kept_equal[name]) == count(plain[name]) - count(plain[name]) // 2
        assert torch.equal(kept_restore[name], plain[name])
        assert not (kept_equal[name] & ~plain[name]).any()
    assert kept is plain
    total = sum(mask.numel() for mask in before.values())
    assert sum(map(count, plain.values())) == pytest.approx(0.25 * total, abs=2)


def test_pruned_and_regenerated_weights_and_their_momentum_start_at_zero(on, run):
    found = state_at(run, 20)
    _, kept, masks = choose(on, found, cell(run, arm="equal"))
    on.place(found, masks, kept)
    for name, p in on.trainer.model.named_parameters():
        if name not in kept:
            continue
        momentum = on.trainer.optimizer.state[p]["momentum_buffer"]
        assert not p[~kept[name]].any()
        assert not momentum[~kept[name]].any()
        assert torch.equal(p[kept[name]], found.model[name][kept[name]])
        assert momentum[kept[name]].any()


def test_a_cell_leaves_checkpoint_and_bench_as_they_were(on, run):
    """Each measurement, after whatever others, gives the same numbers."""
    first = measure(on, cell(run, arm="equal"))
    measure(on, cell(run, step=40, rate=0.9))
    again = measure(on, cell(run, arm="equal"))
    assert numbers(first) == numbers(again)
    assert numbers(measure(Bench(run), cell(run, arm="equal"))) == numbers(first)


def test_both_measures_are_what_their_definitions_say(on, run):
    """Against a plain loop: pruned after epoch 1, with the drop after epoch 2 on the way to the end."""
    result = measure(on, cell(run, retrain=30))
    found = state_at(run, 20)
    _, _, masks = choose(on, found, cell(run))

    def train(until, rate):
        on.place(found, masks)
        trainer = on.trainer
        for step in range(20, until):
            if step % 20 == 0:
                batches = list(trainer.images.epoch_from(trainer.step))
            x, y = batches[step % 20]
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate(step)
            loss = torch.nn.functional.cross_entropy(trainer.model.train()(x), y)
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        for name, p in trainer.model.named_parameters():
            if name in masks:
                assert not p[~masks[name]].any()
        return trainer.evaluate("test").accuracy

    assert result["accuracy_retrained"] == train(50, lambda step: 0.1)
    settings = on.trainer.settings
    assert [learning_rate(settings, step, 80) for step in (39, 40, 60)] == pytest.approx([0.1, 0.01, 0.001])
    assert result["accuracy_final"] == train(80, lambda step: learning_rate(settings, step, 80))
    assert result["accuracy_retrained"] != result["accuracy_final"]
    assert result["plasticity"] == result["accuracy_retrained"] - result["accuracy_before"]
    assert result["final_gap"] == result["accuracy_final"] - run.summary["last"]["test_accuracy"]
    on.place(found, found.state["sparsifier"]["masks"])
    assert result["accuracy_before"] == on.accuracy()
    assert (result["epoch"], result["lr"], result["pretrained_sparsity"]) == (1, 0.1, 0.5)


def test_nothing_pruned_continues_the_run_to_the_bit(on, run):
    found = state_at(run, 40)
    on.place(found, found.state["sparsifier"]["masks"])
    assert on.train(80)
    last = state_at(run, 80)
    assert all(torch.equal(value, last.model[name]) for name, value in on.trainer.model.state_dict().items())


@pytest.mark.parametrize(("step", "retrain"), [(40, 20), (60, 20), (60, 30), (80, 20)])
def test_one_path_for_both_measures_equals_two(on, run, step, retrain, monkeypatch):
    """Where the learning rate does not change on the way, the measures share their training."""
    shared = measure(on, cell(run, step=step, retrain=retrain))
    rates = iter([0.5])  # as if it changed: the first one asked is that of the moment

    def changing(at, real=on.lr):
        return next(rates, None) or real(at)

    separate = Bench(run)
    frozen = separate.lr(step)
    monkeypatch.setattr(separate, "lr", changing)
    real_train = separate.train
    monkeypatch.setattr(separate, "train", lambda until, lr=None: real_train(until, None if lr is None else frozen))
    apart = measure(separate, cell(run, step=step, retrain=retrain))
    assert shared["accuracy_final"] == apart["accuracy_final"]
    assert shared["accuracy_retrained"] == apart["accuracy_retrained"]


def test_a_moving_average_is_pruned_along(tmp_path, recipe):
    run = Run.for_recipe(recipe(ema=0.9, epochs=2), tmp_path)
    execute(run)
    bench = Bench(run)
    result = measure(bench, cell(run, arm="equal", rate=0.9))
    for name, mask in bench.trainer.sparsifier.masks.items():
        assert not dict(bench.trainer.ema.named_parameters())[name][~mask].any()
    assert 0 < result["accuracy_retrained"] <= 1
