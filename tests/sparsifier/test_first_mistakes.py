"""Mistakes that people make first: each is told what is expected, and nothing is changed by it."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import granet
from granet import GMP, METHODS, Probe, RigL, Sparsifier, Static, plan

STATIC = Static(sparsity=0.9)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": "0.9"}, "RigL: sparsity is the text '0.9', and a number is needed"),
        ({"sparsity": None}, "RigL: sparsity is None, and a number is needed"),
        ({"sparsity": float}, "RigL: sparsity is the class float"),
        ({"sparsity": True}, "RigL: sparsity is True"),
        ({"sparsity": torch.tensor(0.9)}, "RigL: sparsity is a Tensor"),
        ({"end": "50%"}, "RigL: end is the text '50%', and a number is needed"),
        ({"end": None}, "RigL: end is None"),
        ({"growth": None}, "RigL: growth is None, and a text is needed"),
        ({"distribution": ["erk"]}, "RigL: distribution is a list, and a text is needed"),
    ],
)
def test_settings_of_the_wrong_type(settings, says):
    with pytest.raises(TypeError, match=says):
        RigL(**{"sparsity": 0.9, "end": 100} | settings)


def test_settings_without_a_name_and_those_that_may_be_none():
    with pytest.raises(TypeError, match=r"RigL takes its settings by name \(sparsity, end, ...\), and 0.9 has none"):
        RigL(0.9)
    with pytest.raises(TypeError, match="GMP: dense_first is 1, and True or False is needed"):
        GMP(sparsity=0.9, end=9, dense_first=1)
    assert GMP(sparsity=0.9, end=9, last_sparsity=None).last_sparsity is None
    assert GMP(sparsity=0, end=9).sparsity == 0  # a whole number is a number


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_is_checked(name):
    kind = METHODS[name]
    for field in dataclasses.fields(kind):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}: {field.name} is a list, and .* needed"):
            kind(**{field.name: []})


def test_methods_are_copied_and_pickled_as_ever():
    method = RigL(sparsity=0.9, end=100)
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method == dataclasses.replace(method)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: Sparsifier(m, RigL), r"the method is the class RigL, and a value.*granet.RigL\(...\)"),
        (lambda m: Sparsifier(m, "rigl"), r"the method is the text 'rigl'.*granet.RigL\(...\)"),
        (lambda m: Sparsifier(m, "top-kast"), r"granet.TopKAST\(...\)"),
        (lambda m: plan(m, "grnet"), r"the text 'grnet'.*granet.GraNet\(...\)"),
        (lambda m: Sparsifier(m, 0.9), "the method is 0.9"),
        (lambda m: Sparsifier(STATIC, m), "the model is a Static.*the model comes first, then the method"),
        (lambda m: Sparsifier(m.parameters(), STATIC), "the model is a generator, and a torch.nn.Module is needed"),
        (lambda m: Sparsifier(m, STATIC, skip=2), "skip= has 2: a filter is a name"),
        (lambda m: Sparsifier(m, STATIC, only=["0", None]), "only= has None: a filter is a name"),
        (lambda m: Sparsifier(m, STATIC, seed="1"), "seed is the text '1', and a whole number is needed"),
        (lambda m: Sparsifier(m, STATIC, verify_every=None), "verify_every is None"),
        (lambda m: Sparsifier(m, STATIC, masks=[torch.ones(40, 20)]), "masks= is a list: a dict"),
        (
            lambda m: Sparsifier(m, STATIC, masks={"0.weight": [1], "2.weight": [1]}),
            "masks: '0.weight' is a list: a bool tensor is needed",
        ),
        (lambda m: Sparsifier(m, granet.SNIP(sparsity=0.5), probe=[]), r"probe= is a list: a granet.Probe\(model"),
        (
            lambda m: Sparsifier(m, STATIC).attach(m),
            r"takes the optimizers of the model, not a Sequential",
        ),
        (lambda m: Sparsifier(m, STATIC).attach(m.parameters()), "not a generator"),
        (lambda m: Sparsifier(m, STATIC).attach(torch.optim.SGD), "not the class SGD"),
        (
            lambda m: Sparsifier(m, STATIC).attach([torch.optim.SGD(m.parameters())]),
            r"not a list: .*attach\(first",
        ),
        (lambda m: Sparsifier(m, STATIC).attach(), r"sparsifier.attach\(optimizer\)"),
        (lambda m: Sparsifier(m, STATIC).load_state_dict(None), r"None was given: what state_dict\(\) of a sparsifier"),
    ],
)
def test_things_of_the_wrong_kind(call, says):
    model = mlp()
    with pytest.raises(TypeError, match=says):
        call(model)


def test_batches_that_are_dicts():
    model = mlp()
    batch = {"x": torch.randn(8, 20), "y": torch.randint(0, 5, (8,))}
    with pytest.raises(ValueError, match=r"batch 0 is a dict with the keys 'x', 'y', not a pair \(inputs, targets\)"):
        Sparsifier(model, granet.SNIP(sparsity=0.5), probe=Probe(model, [batch]))


def test_a_sparsifier_says_what_it_is():
    model = mlp()
    sparsifier = Sparsifier(model, STATIC)
    assert "100 of 1,000 weights active in 2 parameters, step 0, not attached" in repr(sparsifier)
    sparsifier.attach(torch.optim.SGD(model.parameters(), 0.1))
    assert repr(sparsifier).startswith("Sparsifier(Static(sparsity=0.9") and repr(sparsifier).endswith("attached)")


def test_a_name_that_granet_does_not_have():
    with pytest.raises(AttributeError, match="no attribute 'Granet'; did you mean 'GraNet'"):
        _ = granet.Granet


@pytest.mark.parametrize("how", ["global", "ao"])
def test_a_model_that_torch_has_pruned_is_imported_first(how):
    model = mlp()
    if how == "global":
        pairs = [(model[0], "weight"), (model[2], "weight")]
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    else:
        from torch.nn.utils import parametrize

        class Masked(nn.Module):
            def __init__(self, mask):
                super().__init__()
                self.register_buffer("mask", mask)

            def forward(self, weight):
                return weight * self.mask

        parametrize.register_parametrization(model[0], "weight", Masked(torch.rand(40, 20) > 0.5))
    for call in (Sparsifier, plan):
        with pytest.raises(ValueError, match=r"is pruned by torch\..*masks = granet.import_masks\(model\) first"):
            call(model, STATIC)
    masks = granet.import_masks(model)
    sparsifier = Sparsifier(model, granet.Fixed(), masks=masks)
    assert sparsifier.active == sum(int((layer.weight != 0).sum()) for layer in (model[0], model[2]))


def test_a_layer_without_weights_stays_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it initialises nothing
        model = nn.ModuleList([nn.Linear(20, 5), nn.Linear(20, 0)])
    for method in (STATIC, GMP(sparsity=0.5, end=2, interval=1)):
        sparsifier = Sparsifier(model, method)
        assert list(sparsifier.masks) == ["0.weight"]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier.attach(optimizer)
        for _ in range(2):
            model[0](torch.randn(4, 20)).sum().backward()
            optimizer.step()
        sparsifier.detach()
    assert "it is empty" in str(plan(model, STATIC))


def test_sparse_gradients_are_refused_before_the_first_step():
    model = nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"'0.weight' has sparse gradients.*sparse=False.*skip='0.weight'"):
        Sparsifier(model, STATIC, only=["embedding", "linear"])
    assert list(Sparsifier(model, STATIC).masks) == ["1.weight"]


def test_a_model_all_of_whose_weights_are_computed_says_so():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(20, 5)))
    with pytest.raises(ValueError, match=r"no parameter of Sequential is sparse.*parametrized by WeightNorm"):
        Sparsifier(model, STATIC)


def test_patterns_reach_what_modules_define_for_themselves():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
            self.kernel = nn.Parameter(torch.randn(8, 8))
            self.scale = nn.Parameter(torch.ones(8))
            self.head = nn.Linear(8, 8)

    def chosen(only):
        return [row.name for row in plan(Experts(), STATIC, only=only).rows if row.sparse]

    assert chosen("experts.*") == chosen("experts") == chosen(nn.ParameterList) == ["experts.0", "experts.1"]
    assert chosen("ker*") == ["kernel"] and chosen(Experts) == ["kernel"]
    assert chosen(["experts.*", "head"]) == ["experts.0", "experts.1", "head.weight"]
    assert chosen("*") == ["head.weight"]  # what is sparse by default goes first
    with pytest.raises(ValueError, match="only='scal' matches no parameter"):
        chosen("scal")


def python(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("name", ["sharded", "models", "lab"])
def test_modules_are_imported_before_torch(name):
    python(f"from granet import {name}; import torch; assert len(dir({name})) > 5")


def test_the_line_of_the_documentation_that_leaves_a_group():
    python("import granet; granet.ranks.leave()")


def test_a_module_that_is_not_imported_yet_can_be_changed_and_asked():
    python(
        "import granet, sys; late = granet.schedule; assert 'granet.schedule' not in sys.modules; "
        "late.extra = 1; assert granet.schedule.extra == 1 and 'granet.schedule' in sys.modules"
    )
