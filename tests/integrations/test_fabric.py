import pytest
import torch

import granet

fabric = pytest.importorskip("lightning.fabric", reason='needs pip install "granet[lightning]"')


@pytest.fixture
def train(problem):
    def run(method="granet", optimizer="sgd", *, accumulate=1, save=None, load=None, precision="32-true"):
        fab = fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = problem.network(seed=1 if load else 0)
        sparsifier = granet.Sparsifier(model, problem.method(method), seed=1 if load else 7)
        model, optimizer = fab.setup(model, problem.optimizer(model, optimizer))
        sparsifier.attach(optimizer)
        state = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
        if load:
            fab.load(load, state)
        for i, (x, y) in enumerate(problem.loader()):
            if i < sparsifier.step * accumulate:
                continue
            fab.backward(model(x, y)["loss"] / accumulate)
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            if save and sparsifier.step == 10:
                fab.save(save, state)
                save = None
        return model.module, sparsifier

    return run


@pytest.mark.parametrize("method", ["granet", "rigl"])
def test_equals_the_plain_loop(method, problem, train, same):
    same(*train(method, "adamw"), *problem.plain(method, "adamw")[:2])


def test_accumulation_equals_the_plain_loop(problem, train, same):
    same(*train(accumulate=2), *problem.plain(accumulate=2)[:2])


def test_autocast_equals_the_plain_loop(problem, train, same):
    same(*train(precision="bf16-mixed"), *problem.plain(autocast=torch.bfloat16)[:2])


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_resume_is_bitwise(method, optimizer, train, same, tmp_path):
    whole = train(method, optimizer, save=tmp_path / "saved.ckpt")
    same(*train(method, optimizer, load=tmp_path / "saved.ckpt"), *whole)
