import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from granet import METHODS, GraNet, RigL, RigLITOP
from granet.train import data, recipes, sections
from granet.train.recipe import FILE_KEYS, SECTIONS, Data, Model, Recipe, RecipeError, Train, in_steps, schema, validate

TINY = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "method": {"name": "dense"}}


def test_every_hyper_parameter_is_explained():
    for section in (Data, Model, Train, Recipe, *SECTIONS.values()):
        for name, field in section.model_fields.items():
            assert field.description or name in ("data", "model", "method", "train"), (section.__name__, name)


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0, 0), (7, 7), ("7", 7), ("1000it", 1000), ("80ep", 28_160), ("0.5ep", 176), ("50%", 28_160), ("2.5%", 1408)],
)
def test_units(value, steps):
    assert in_steps(value, steps_per_epoch=352, epochs=160) == steps


@pytest.mark.parametrize("value", ["80 epochs", "ep", "-3it", "1e3", "50 %", -1])
def test_units_that_are_none(value):
    with pytest.raises(ValueError, match="steps"):
        in_steps(value, steps_per_epoch=1, epochs=1)


def test_a_method_is_resolved_to_integer_steps():
    method = recipes.load("cifar10-vgg19").resolve(352)
    assert method == GraNet(sparsity=0.9, initial_sparsity=0.5, begin=0, end=28_160, total=56_320, interval=1000)


def test_settings_are_resolved_to_integer_steps():
    train = Train(warmup="5ep", milestones=("30%", "60ep", 9), epochs=100)
    resolved = train.resolved(steps_per_epoch=10, epochs=100)
    assert (resolved["warmup"], resolved["milestones"], resolved["lr"]) == (50, (300, 600, 9), 0.1)


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_valid_and_resolves(name):
    recipe = recipes.load(name)
    method = recipe.resolve(400)
    assert isinstance(method, METHODS[recipe.method.name])
    assert validate(yaml.safe_load(recipe.to_yaml()), source=name) == recipe
    assert validate(yaml.safe_load(recipe.to_yaml(defaults=False)), source=name) == recipe


def test_the_settings_of_the_paper():
    cifar = recipes.load("cifar100-resnet50-granet-d2s")
    assert (cifar.method.initial_sparsity, cifar.model.name, cifar.data.name) == (0.0, "resnet50-cifar", "cifar100")
    train = cifar.train
    assert (train.epochs, train.batch_size, train.lr, train.momentum, train.nesterov) == (160, 128, 0.1, 0.9, True)
    resolved = train.resolved(steps_per_epoch=1, epochs=160)
    assert (resolved["milestones"], train.gamma, train.weight_decay) == ((80, 120), 0.1, 5e-4)

    assert (train.partial_batch, cifar.data.padding) == (True, "zeros")
    assert data.steps_per_epoch(45_000, train.batch_size, drop_last=not train.partial_batch) == 352
    for name, more in (("rigl", {}), ("set", {"growth": "random"})):  # as the paper's tables have them
        baseline = recipes.load(f"cifar10-vgg19-{name}")
        assert baseline.name == f"cifar10-vgg19-{name}" and baseline.data.padding == "reflect"
        method = baseline.resolve(352)
        assert method == RigLITOP(sparsity=0.9, total=56_320, interval=1000, drop_fraction=0.5, **more)
        assert not method.replaces_step and method.regeneration_at(56_320) == 0.005

    imagenet = recipes.load("imagenet-resnet50")
    assert recipes.load("imagenet-resnet50-rigl").resolve(10) == RigLITOP(sparsity=0.8, total=1000, interval=4000)
    assert not imagenet.train.partial_batch
    resolved = imagenet.train.resolved(steps_per_epoch=1, epochs=100)
    assert (resolved["milestones"], resolved["warmup"]) == ((30, 60, 90), 5)
    assert (imagenet.train.label_smoothing, imagenet.train.weight_decay) == (0.1, 1e-4)
    assert imagenet.resolve(10_000) == GraNet(
        sparsity=0.8, initial_sparsity=0.5, end=300_000, total=1_000_000, interval=4000
    )


def test_a_method_can_be_chosen_in_three_ways():
    by_name, by_argument = recipes.load("digits-rigl"), recipes.load("digits", method="rigl")
    assert by_name == by_argument
    assert by_name.name == "digits-rigl"
    assert isinstance(by_name.resolve(20), RigL)


def test_a_method_without_settings_takes_the_sparsity_of_the_recipe(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(TINY | {"method": {"name": "static", "sparsity": 0.83}}))
    assert recipes.load(str(file), method="set").method.sparsity == 0.83
    with pytest.raises(RecipeError, match=r"method\.end: is missing"):
        recipes.load(str(file), method="rigl")


def test_a_file_of_your_own_can_start_from_a_shipped_one(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("base: digits\ntrain: {epochs: 3}\nmethods: {granet: {sparsity: 0.98}}\n")
    own, shipped = recipes.load(str(file)), recipes.load("digits")
    assert (own.name, own.train.epochs, own.method.sparsity) == ("own-granet", 3, 0.98)
    assert (own.train.batch_size, own.method.interval) == (shipped.train.batch_size, shipped.method.interval)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train": {"epoch": 3}}, r"train\.epoch: there is no such key; did you mean 'epochs'\?"),
        ({"sede": 3}, r"sede: there is no such key; did you mean 'seed'\?"),
        ({"method": {"name": "grnet"}}, r"there is no method 'grnet'; did you mean 'granet'\?"),
        ({"method": {"name": "set", "sparsty": 0.5}}, r"method\.sparsty: .* did you mean 'sparsity'\?"),
        ({"model": {"name": "restnet20"}}, r"model\.name: there is no model 'restnet20'; did you mean 'resnet20'\?"),
        ({"data": {"name": "cifar"}}, r"data\.name: there is no dataset 'cifar'; did you mean 'cifar10"),
        ({"data": None}, r"data: .* got None"),
        ({"train": {"lr": -1}}, r"train\.lr: must be greater than 0, got -1$"),
        ({"train": {"lr": float("inf")}}, r"train\.lr: must be a finite number, got inf$"),
        ({"train": {"gamma": 1}}, r"train\.gamma: must be less than 1, got 1$"),
        ({"train": {"epochs": 1.5}}, r"train\.epochs: must be a whole number, got 1\.5$"),
        ({"train": {"lr": "fast"}}, r"train\.lr: must be a number, got 'fast'$"),
        ({"train": {"nesterov": "maybe"}}, r"train\.nesterov: must be true or false, got 'maybe'$"),
        ({"train": {"threads": 100_000}}, r"train\.threads: must be 1,024 or less, got 100000$"),
        ({"train": {"milestones": ["150%"]}}, r"train\.milestones\.0: '150%' is too much: 100%, the whole training"),
        ({"train": {"warmup": "200%"}}, r"train\.warmup: '200%' is too much: 100%"),
        ({"train": {"warmup": f"{'9' * 400}ep"}}, r"train\.warmup: '9+\.\.\.9+ep' is too much: 1,000,000,000,000 are"),
        ({"train": {"warmup": 10**30}}, r"train\.warmup: a number of steps must be from 0 to 1,000"),
        ({"train": {"warmup": None}}, r"train\.warmup: is not a number of steps: write 1000, .*, got None$"),
        ({"data": {"name": "digits", "validation": "x"}}, r"data\.validation: must be a number, got 'x'$"),
        ({"method": {"name": "set", "sparsity": 0.9, "interval": "150%"}}, r"method\.interval: '150%' is too much"),
        ({"seed": 10**30}, r"seed: must be less than 9,223,372,036,854,775,808, got 1000000000"),
        ({"seed": 10**30_000}, r"seed: must be less than .*, got a number of many digits$"),
        ({"name": "a" * 300}, r"name: a name must have 180 bytes at most, .*, got 'aaa[a.]*'$"),
        ({"name": "\U0001f600" * 50}, r"name: a name must have 180 bytes at most"),
        ({"name": "a\x1b[2J"}, r"name: a name must not contain control characters, got 'a\\x1b\[2J'$"),
        ({"data": {"name": "digits", 1: 2}}, r"data\.1: a key must be a text"),
        ({"sumary": "x"}, r"sumary: there is no such key; "),
        ({"train": {"warmup": "5 epochs"}}, r"train\.warmup: '5 epochs' is not a number of steps: write .*\)$"),
        ({"train": {"optimizer": "adamw", "nesterov": True}}, "nesterov belongs to sgd"),
        ({"train": {"batch_size": 10, "accumulate": 3}}, "cannot be split"),
        ({"name": "../elsewhere"}, r"name: .* got '\.\./elsewhere'"),
        ({"name": ""}, r"name: "),
        ({"method": {"sparsity": 0.5}}, r"method\.name: is missing; choose from ac-dc, "),
        ({"method": [1]}, r"method: must be a mapping of keys to values, got \[1\]"),
        ({"train": {"milestones": 3}}, r"train\.milestones: must be a list, got 3"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_choice(values, says):
    with pytest.raises(RecipeError, match=says):
        validate(TINY | values, source="test")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digit", "did you mean 'digits'"),
        ("cifar10-vgg19-rigle", "did you mean 'cifar10-vgg19-rigl'"),
        ("_cifar", "there is no recipe"),
        ("nowhere/x.yaml", r"there is no recipe file nowhere/x\.yaml"),
    ],
)
def test_an_unknown_recipe(name, says):
    with pytest.raises(RecipeError, match=says):
        recipes.load(name)


def test_what_is_no_mapping_at_all():
    with pytest.raises(RecipeError, match=r"the whole: .* got 5"):
        validate(5, source="test")


def test_an_unknown_method_of_a_recipe():
    with pytest.raises(RecipeError, match="no method 'regl'; did you mean 'rigl'"):
        recipes.load("digits", method="regl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {lr: 1, lr: 2}", "'lr' is given twice"),
        ("train: [", "cannot be read"),
        ("- a list", "is not a recipe: it must be a mapping"),
        ("base: digit", "did you mean 'digits'"),
        ("base: own", "in a circle"),
        ("base: digits\nmethods: 3", "methods must be a mapping from names to settings; got 3"),
        ("base: digits\nmethods:", "methods must be a mapping from names to settings; got None"),
        ("base: digits\ntrain: {epochs: !!python/object/apply:os.getcwd []}", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, says):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says):
        recipes.load(str(file))


def test_the_digest_tells_what_is_not_default():
    recipe = validate(TINY, source="test")
    digest = recipe.digest()
    assert len(digest) == 6
    assert validate(TINY | {"seed": 0, "train": {"epochs": Train().epochs}}, source="test").digest() == digest
    assert validate(TINY | {"name": "other"}, source="test").digest() == digest
    assert validate(TINY | {"data": {"name": "digits", "root": "/elsewhere"}}, source="test").digest() == digest
    others = [
        {"seed": 1},
        {"train": {"lr": 0.2}},
        {"method": {"name": "static", "sparsity": 0.5}},
        {"method": {"name": "static", "sparsity": 0.6}},
        {"data": {"name": "digits", "crop": 1}},
    ]
    assert len({digest, *(validate(TINY | other, source="test").digest() for other in others)}) == 6


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        recipes.load("digits").seed = 3


def test_the_schema_has_every_key_of_the_shipped_files():
    definition = schema()
    json.dumps(definition)
    for file in recipes.catalog():
        assert set(file.sections) | {"base", "summary", "methods"} <= set(definition["properties"])
    assert "epochs" in definition["$defs"]["Train"]["properties"]
    assert definition["$defs"]["Train"]["additionalProperties"] is False


def test_recipes_need_no_torch():
    code = "import sys; from granet.train import recipes; recipes.load('digits').resolve(9)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_hyper_parameter_is_explained_where_it_stands(name):
    """In the docstring of the method, which `help()`, editors, the reference and the command line show."""
    described = sections._descriptions(METHODS[name])
    assert set(described) == {field.name for field in dataclasses.fields(METHODS[name])}
    assert all(len(text) > 10 for text in described.values())


def test_messages_are_our_own_and_short():
    values = dict.fromkeys(("epochs", "lr", "nesterov", "optimizer", "warmup", "device", "engine"), "x" * 10000)
    values |= {f"key{i}": list(range(1000)) for i in range(100)}
    with pytest.raises(RecipeError) as error:
        validate(TINY | {"train": values}, source="test")
    message = str(error.value)
    assert "http" not in message and "pydantic" not in message and "Input should" not in message
    assert message.endswith("... and 86 more")
    assert max(map(len, message.splitlines())) < 900  # the choices of keys among it


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("methods: {granet: null}", r"methods\.granet must be a mapping such as 'granet: \{name: granet, .*; got None"),
        ("methods: {1: {}}", r"methods\.1 must be a mapping"),
        ("methods: []", r"methods must be a mapping from names to settings; got \[\]"),
        ("base: [digits]", r"base must be the name of a recipe; got \['digits'\]"),
        (f"base: {'x' * 300}", "base must be the name of a recipe; got 'xxx"),
        ("base: digit", r"has no base 'digit'; did you mean 'digits'\?"),
        ("summary: [1]", r"summary must be a line of text; got \[1\]"),
        (
            "basis: digits",
            r"basis: there is no such key; did you mean 'base'\? \(choices: .*, base, summary, methods\)",
        ),
        ("a: [" * 3000, "own.yaml cannot be read as a recipe: .*nest"),
        ("&a [*a]", r"own.yaml cannot be read as a recipe: the alias \*a holds itself"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_a_line_or_two(tmp_path, content, says):
    file = tmp_path / "own.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=says) as error:
        recipes.load(str(file))
    assert len(str(error.value)) < 1200


def test_bases_in_a_circle_are_named_once(tmp_path):
    for name, base in (("a", "b"), ("b", "folder/../c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError, match=r"the bases of a\.yaml go in a circle: a -> b -> c -> a$"):
        recipes.load(str(tmp_path / "a.yaml"))


def test_a_moment_that_rounds_to_nothing_is_said_as_it_was_given():
    recipe = recipes.load("digits", method="granet")
    with pytest.raises(RecipeError, match=r"end=0 is not a positive number of steps; .* 1 in the training, 1 an epoch: "
                       r"method\.end '50%' is 0$"):  # fmt: skip
        recipe.method.build(steps_per_epoch=1, epochs=1)


def test_the_keys_of_recipe_files_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for key in (*FILE_KEYS, *Recipe.model_fields):
        assert f"`{key}`" in text, key
