"""Runs and tables that the tests of several modules share."""

import dataclasses

import pytest
import torch

from granet.lab.plasticity import table as tables
from granet.train import recipes
from granet.train.recipe import validate
from granet.train.run import Run, execute


@pytest.fixture(scope="session")
def recipe():
    """A function that returns a short recipe of a sparse network."""

    def make(method=None, **train):
        values = recipes.load("plasticity-digits", method="dense").model_dump()
        values["train"] |= {"epochs": 4, "threads": 1, "device": "cpu", "keep": ("1ep", "2ep", "3ep"), **train}
        values["method"] = method or {"name": "static", "sparsity": 0.5, "distribution": "uniform"}
        return validate(values, source="test")

    return make


@pytest.fixture(scope="session")
def run(recipe, tmp_path_factory):
    """A trained run of 4 epochs of 20 steps, learning rate dropped after 2 and 3; checkpoints after every epoch."""
    run = Run.for_recipe(recipe(), tmp_path_factory.mktemp("runs"))
    execute(run)
    return run


@pytest.fixture(scope="session")
def made_up():
    """A function that returns a table of made-up results."""

    def make(effect, seeds=3, drops=(4.0, 8.0), noise=0.001):
        """A table whose plasticity and gap are `effect(sparsity, rate, arm, phase)` in points, with a little noise."""
        results, draws = [], torch.Generator().manual_seed(0)
        for seed in range(seeds):
            for sparsity in (0.0, 0.9):
                for rate in (0.2, 0.5, 0.9, 0.98):
                    for arm in ("none", "restore", "equal"):
                        for epoch in (1, 3, 5, 7, 9, 11):
                            value = effect(sparsity, rate, arm, sum(epoch >= drop for drop in drops)) / 100
                            value += noise * float(torch.randn((), generator=draws))
                            row = tables.Row(
                                sparsity, seed, epoch * 10, epoch, 0.1, rate, arm, "global", 1 - sparsity, 0.1, 0.8,
                                0.8 + value, value, 0.9, 0.9 + value, value, 1.0,
                            )  # fmt: skip
                            results.append(row)
        return tables.table(
            "made-up", [dataclasses.asdict(row) for row in results], epochs=12, drops=drops, retrain=2.0, tested=10_000
        )

    return make


@pytest.fixture(scope="session")
def like_the_paper():
    """A function of sparsity, rate, arm and phase whose values agree with the findings of the paper."""

    def effect(sparsity, rate, arm, phase):
        """Points: high first, falling by 2 and then by 6, more at high rates; regeneration mends most there."""
        value = 3 - (0, 2, 8)[phase] * (0.3 + rate)
        if rate > 0.8 and arm != "none":
            value += 3
        return max(value, 0.5) if rate == 0.2 else value

    return effect
