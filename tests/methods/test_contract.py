"""What every method does by itself: pure updates, declared needs, settings that are checked, values that compare."""

import copy
import typing

import pytest
import torch
from torch import nn

import granet
from granet import METHODS, Probe
from granet.criterion import Layer
from method_settings import SETTINGS, VARIANTS, every, make


class Bag(nn.Module):
    """Layers of any shapes as one network, so that a probe can look at them: the loss is half the sum of g * w ** 2."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            self.register_parameter(name, nn.Parameter(layer.weight.clone()))
            grad = torch.ones_like(layer.weight) if layer.grad is None else layer.grad
            self.register_buffer(f"{name}_grad", grad.clone())

    def forward(self, x):
        return torch.cat([(self.get_buffer(f"{n}_grad") * w**2 / 2).flatten() for n, w in self.named_parameters()])


def start(method, layers, rng):
    """The masks that the method starts from."""
    if not method.needs_probe:
        return method.init(layers, rng)
    return method.init(layers, rng, Probe(Bag(layers), [(torch.ones(1), torch.ones(1))], lambda y, _: y.sum()))


def updated(method, step, layers, masks, rng):
    """`method.update`, with an empty memory if it takes one."""
    return method.update(step, layers, masks, rng, *([{}] if method.remembers else []))


def test_every_method_is_under_contract():
    assert set(SETTINGS) == set(METHODS)


@every
def test_update_is_pure_and_deterministic(variant):
    method = make(variant)
    rng = torch.Generator().manual_seed(3)
    layers = {
        k: Layer(torch.randn(n, 12, generator=rng), torch.randn(n, 12, generator=rng)) for k, n in (("a", 9), ("b", 30))
    }
    kept = copy.deepcopy([(layer.weight, layer.grad) for layer in layers.values()])
    masks = start(method, layers, torch.Generator().manual_seed(1))
    before = {name: mask.clone() for name, mask in masks.items()}
    first, second = (updated(method, 8, layers, masks, torch.Generator().manual_seed(2)) for _ in range(2))
    for i, (name, layer) in enumerate(layers.items()):
        assert torch.equal(first[name], second[name])
        assert torch.equal(masks[name], before[name])
        assert torch.equal(layer.weight, kept[i][0]) and torch.equal(layer.grad, kept[i][1])
        assert first[name].dtype == torch.bool and first[name].shape == layer.shape


@every
def test_equal_scores_give_equal_masks_in_half_precision(variant):
    """bfloat16 weights and gradients that float32 holds exactly: the method must see the same scores."""
    method = make(variant)
    rng = torch.Generator().manual_seed(5)
    half = {
        k: Layer(*(torch.randn(n, 16, generator=rng).bfloat16() for _ in range(2))) for k, n in (("a", 10), ("b", 31))
    }
    full = {name: Layer(layer.weight.float(), layer.grad.float()) for name, layer in half.items()}
    masks = start(method, full, torch.Generator().manual_seed(1))
    a, b = (updated(method, 12, layers, masks, torch.Generator().manual_seed(2)) for layers in (half, full))
    assert all(torch.equal(a[name], b[name]) for name in masks)


@every
def test_nonsense_is_refused_by_name(variant):
    kind, settings = METHODS[variant.split()[0]], VARIANTS[variant]
    for name, bad in {
        "sparsity": (1.0, -0.1),
        "initial_sparsity": (1.0, 0.95),
        "interval": (0, -3, 1.5),
        "end": (-1, 0),
        "total": (0,),
        "drop_fraction": (1.5,),
        "min_salient": (1.5, -0.1),
        "regeneration": (-0.1,),
        "distribution": ("erq",),
        "scope": ("local",),
        "halve": (0, 19),
        "l1": (-0.1,),
        "threshold": (0.0,),
        "tolerance": (1.5,),
        "gradient_weight": (-1.0, float("nan")),
        "rounds": (0, 2.5),
        "temperature": (-1.0, float("nan"), *([0.0] if kind is METHODS["grasp"] else [])),
        "s_init": (float("inf"), float("nan")),
        "backward_sparsity": (-0.1, 0.95),
        "decay": (-1.0, float("nan")),
    }.items():
        if name not in kind.__dataclass_fields__:
            continue
        for value in bad:
            with pytest.raises(ValueError, match=name if name != "distribution" else "erq"):
                kind(**{**settings, name: value})
    with pytest.raises(TypeError, match="sparsty"):
        kind(**settings, sparsty=0.5)


@every
def test_a_method_is_a_value(variant):
    a, b = make(variant), make(variant)
    assert a == b and hash(a) == hash(b) and repr(a) == repr(b)
    assert eval(repr(a), vars(granet) | {type(a).__name__: type(a)}) == a
    with pytest.raises(AttributeError):
        a.sparsity = 0.1


@pytest.mark.parametrize("name", METHODS)
def test_fields_measured_in_steps_say_so(name):
    hints = typing.get_type_hints(METHODS[name], include_extras=True)
    steps = {
        field for field in METHODS[name].__dataclass_fields__ if getattr(hints[field], "__metadata__", ()) == ("steps",)
    }
    all_of_them = {"accumulate", "begin", "dense_interval", "end", "halve", "interval", "total"}
    assert steps == all_of_them & set(METHODS[name].__dataclass_fields__)


@every
def test_declared_needs_are_true(variant):
    """A method that says it needs no dense gradient gives the same masks without one; one that says so fails."""
    method = make(variant)
    layers = {"a": Layer(torch.randn(20, 20))}
    masks = start(method, layers, torch.Generator())
    if method.needs_grad:
        with pytest.raises(ValueError, match="gradient"):
            updated(method, 4, layers, masks, torch.Generator())
    else:
        updated(method, 4, layers, masks, torch.Generator())
