import re
import time

import pytest

from granet.lab.sweep import grid
from granet.lab.sweep.grid import SweepError, cells, load

SMALL = """
recipe = "digits"
seeds = [4, 2]
methods = [
    "dense",
    {name = "static", label = "uniform", method.distribution = "uniform", "train.epochs" = 3},
    {name = "granet", method.initial_sparsity = [0.0, 0.5]},
]
[grid]
method.sparsity = [0.9, 0.98]
"train.epochs" = 2
train.warmup = "1ep"
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.toml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_every_combination_is_a_cell_and_dense_is_not_multiplied(write):
    found = cells(load(write(SMALL)))
    first = [cell for cell in found if cell.recipe.seed == 4]
    assert [(c.label, c.at("method.sparsity"), c.at("method.initial_sparsity")) for c in first] == [
        ("dense", None, None),
        ("uniform", 0.9, None),
        ("uniform", 0.98, None),
        ("granet", 0.9, 0.0),
        ("granet", 0.9, 0.5),
        ("granet", 0.98, 0.0),
        ("granet", 0.98, 0.5),
    ]
    assert [c.recipe.train.epochs for c in first] == [2, 3, 3, 2, 2, 2, 2]
    assert {c.recipe.method.distribution for c in found if c.label == "uniform"} == {"uniform"}
    assert {c.recipe.train.warmup for c in found} == {"1ep"}
    # the second seed is the same again, after all of the first
    assert [c.recipe.seed for c in found] == [4] * 7 + [2] * 7
    assert [c.recipe.model_copy(update={"seed": 4}) for c in found[7:]] == [c.recipe for c in first]


def test_a_setting_that_leaves_the_common_ground_is_named(write):
    found = cells(load(write(SMALL)))
    assert {(c.label, c.apart) for c in found} == {
        ("dense", ()),
        ("uniform", ("train.epochs 3 instead of 2",)),
        ("granet", ()),
    }


def test_what_varies_is_known_with_the_sparsity_first(write):
    sweep = load(write(SMALL))
    assert sweep.varied == ("method.sparsity", "method.initial_sparsity")
    assert (sweep.name, [entry.title for entry in sweep.methods]) == ("mine", ["dense", "uniform", "granet"])


def test_several_recipes_one_of_them_a_file_beside_the_sweep(write):
    write("base: digits\ntrain: {lr: 0.02}\n", "slow.yaml")
    found = cells(load(write('recipe = ["digits", "slow.yaml"]\nmethods = ["rigl"]')))
    assert [(c.recipe.name, c.recipe.train.lr) for c in found] == [("digits-rigl", 0.1), ("slow-rigl", 0.02)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds", "seds"), r"seds: there is no such key; did you mean 'seeds'\?"),
        (("label =", "lable ="), r"methods\.1\.lable: there is no such key; did you mean 'label'\?"),
        (('"train.epochs" = 2', "tain.epochs = 2"), r"grid\.tain: there is no such key; did you mean 'train'\?"),
        (('"train.epochs" = 2', "train.epoch = 2"), r"train\.epoch: there is no such key; did you mean 'epochs'\?"),
        (('recipe = "digits"', 'recipe = "digit"'), r"there is no recipe 'digit'; did you mean 'digits'\?"),
        (('"dense"', '"denst"'), r"digits, denst: the recipe digits has no method 'denst'; did you mean 'dense'\?"),
        (('label = "uniform"', 'label = "granet"'), "two methods are called 'granet'"),
        (('"train.epochs" = 2', "train.epochs = [2, 0]"), r"digits, dense, train\.epochs 0, train\.warmup 1ep: "),
        (("[0.9, 0.98]", "[]"), r"method\.sparsity is an empty list"),
        (("[4, 2]", "[]"), "seeds: .*at least 1"),
        (("[4, 2]", "[-4]"), "seeds.0: must be 0 or more, got -4$"),
        (("method.sparsity", "method.sparsty"), r"no method here has method\.sparsty; did you mean 'method\.sparsity'"),
        (("method.distribution", "method.scope"), r"(?s)digits, uniform.*method\.scope: there is no such key"),
        (("train.warmup", 'train = 3\n"train.warmup"'), "train is given twice"),
        (('recipe = "digits"', ""), "recipe: is missing"),
        (("[grid]", "[grid"), "mine.toml cannot be read as TOML"),
    ],
)
def test_what_is_wrong_is_said(write, change, message):
    assert change[0] in SMALL
    text = SMALL.replace(*change, 1)
    with pytest.raises(SweepError, match=message):
        cells(load(write(text)))


def test_a_pair_to_compare_must_be_there(write):
    with pytest.raises(SweepError, match=r"report\.compare: there is no method 'granett' here; did you mean 'granet'"):
        load(write(SMALL + '[report]\ncompare = [["granett", "dense"]]'))
    with pytest.raises(SweepError, match=r"report\.selct: there is no such key; did you mean 'select'"):
        load(write(SMALL + '[report]\nselct = "best"'))


def test_of_many_problems_some_are_told(write):
    with pytest.raises(SweepError) as caught:
        cells(load(write(SMALL.replace('"train.epochs" = 2', "train.lr = [-1, -2]"))))
    assert re.search(r"\.\.\. and 6 more$", str(caught.value)), str(caught.value)


def test_no_such_sweep_names_those_there_are(tmp_path):
    with pytest.raises(SweepError, match=r"there is no sweep 'digit'; did you mean 'digits'\? \(choices: .*digits"):
        load("digit")
    with pytest.raises(SweepError, match=r"there is no file .*none\.toml; sweeps of the package: .*digits"):
        load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", grid.names())
def test_every_sweep_of_the_package_expands(name):
    sweep = load(name)
    found = cells(sweep)
    assert sweep.summary
    assert {cell.label for cell in found} == {entry.title for entry in sweep.methods}
    # weight decay decides how sparse STR gets, so it cannot be that of the others
    assert {cell.recipe.method.name for cell in found if cell.apart} <= {"str"}


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "a/b", "", ".hidden", "a\\u001b[2Jb", "x" * 300])
def test_a_name_stays_in_its_folder(write, name):
    with pytest.raises(SweepError, match=r"name: a name "):
        grid.load(write(f'name = "{name}"\n{SMALL}'))


def test_a_grid_of_millions_is_counted_not_made(write):
    axes = "".join(
        f'"train.{key}" = {list(range(1, 61))}\n' for key in ("epochs", "batch_size", "log", "evaluate", "probe")
    )
    began = time.perf_counter()
    with pytest.raises(SweepError, match=r"the sweep has 777,600,000 runs .*10,000 are the most"):
        grid.cells(grid.load(write(f'recipe = "digits"\nmethods = ["dense"]\n[grid]\n{axes}')))
    with pytest.raises(SweepError, match=r"the sweep has 40,000 runs \(recipes times methods\)"):
        grid.cells(grid.load(write(f'recipe = {["digits"] * 40_000}\nmethods = ["dense"]')))
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("text", ["a = " + "[" * 50_000 + "]" * 50_000, ".".join("a" * 50_000) + " = 1", "\xff"])
def test_a_file_that_would_exhaust_the_reader_is_refused(write, text):
    with pytest.raises(SweepError, match=r"mine\.toml (cannot be read as TOML|is not valid)"):
        grid.load(write(text))
