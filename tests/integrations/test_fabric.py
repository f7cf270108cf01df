import pytest
import torch

import granet

fabric = pytest.importorskip("lightning.fabric", reason='needs pip install "granet[lightning]"')


@pytest.fixture
def train(problem):
    def run(
        method="granet",
        optimizer="sgd",
        *,
        accumulate=1,
        save=None,
        load=None,
        clip=None,
        average=None,
        backend=None,
        **options,
    ):
        fab = fabric.Fabric(accelerator="cpu", devices=1, **options)
        model = problem.network(seed=1 if load else 0)
        sparsifier = granet.Sparsifier(model, problem.method(method), seed=1 if load else 7)
        optimizer = problem.optimizer(model, optimizer)
        model, optimizer = fab.setup(torch.compile(model, backend=backend) if backend else model, optimizer)
        sparsifier.attach(optimizer)
        averaged = average and average(sparsifier.model)
        if averaged:
            sparsifier.follow(averaged)
        state = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
        if load:
            fab.load(load, state)
        for i, (x, y) in enumerate(problem.loader()):
            if i < sparsifier.step * accumulate:
                continue
            fab.backward(model(x, y)["loss"] / accumulate)
            if (i + 1) % accumulate == 0:
                if clip:
                    clip(fab, sparsifier, model, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                if averaged:
                    averaged.update_parameters(sparsifier.model)
            if save and sparsifier.step == 10:
                fab.save(save, state)
                save = None
        return averaged.module if averaged else sparsifier.model, sparsifier

    return run


@pytest.mark.parametrize("method", ["granet", "rigl"])
def test_equals_the_plain_loop(method, problem, train, same):
    same(*train(method, "adamw"), *problem.plain(method, "adamw")[:2])


def test_accumulation_equals_the_plain_loop(problem, train, same):
    same(*train(accumulate=2), *problem.plain(accumulate=2)[:2])


def test_autocast_equals_the_plain_loop(problem, train, same):
    same(*train(precision="bf16-mixed"), *problem.plain(autocast=torch.bfloat16)[:2])


def test_fabric_clips_by_dense_gradients_and_the_sparsifier_by_live_ones(train, clips):
    by = {
        "stack": lambda fab, sparsifier, model, optimizer: fab.clip_gradients(model, optimizer, max_norm=0.03),
        "sparsifier": lambda fab, sparsifier, model, optimizer: sparsifier.clip_grad_norm_(0.03),
    }
    clips(lambda who: train(clip=by[who]))


def test_an_average_is_followed(problem, train, same):
    averaged, sparsifier = train(average=problem.average)
    same(averaged, sparsifier, *problem.plain(average=problem.average)[:2])
    assert not torch.equal(averaged.net[0].weight, sparsifier.model.net[0].weight)


def test_compiled_equals_the_plain_loop(problem, train, same, compiles):
    same(*train(backend=compiles), *problem.plain()[:2])


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_resume_is_bitwise(method, optimizer, train, same, tmp_path):
    whole = train(method, optimizer, save=tmp_path / "saved.ckpt")
    same(*train(method, optimizer, load=tmp_path / "saved.ckpt"), *whole)
