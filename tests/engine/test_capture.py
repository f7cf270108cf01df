"""A compiled model computes what the model computes, whatever the model's code does, and leaves the model alone."""

import copy
import io
import logging
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fuzz_graphs import check_all
from small_models import change_in_place, close, counting, mlp, sparse
from torch import nn

from granet.engine import inference, search


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_random_models(always, precision):
    """Branches, aliases, views, in-place operations, optional and keyword arguments, state and hooks."""
    assert check_all(0, 2, precision) == {"sparse": 2}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_many_random_models(precision):
    chosen = check_all(2, 60, precision)
    assert chosen["sparse"] > 48


def test_hooks_run_also_those_added_later(always):
    model, x, seen = mlp(), torch.randn(4, 16), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    fast = inference.compile(model, x)
    seen.clear()
    fast(x)
    assert len(seen) == 1
    close(seen[0], model[0](x).detach())
    hooks = [
        model[2].register_forward_hook(lambda module, args, out: out * 2),
        model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        model.register_forward_hook(lambda module, args, out: out + 3),
    ]
    close(fast(x), model(x).detach())
    for hook in hooks:
        hook.remove()
    close(fast(x), model(x).detach())


def test_a_branch_on_an_optional_argument(always):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, other=None):
            return self.a(x) if other is None else self.b(other)

    model, x = sparse(Branch()), torch.randn(4, 16)
    fast = inference.compile(model, torch.zeros(4, 16))
    close(fast(x), model(x).detach())
    close(fast(x, other=x), model(x, x).detach())
    close(fast(x, None), model(x).detach())


def test_under_autocast_and_with_gradients_the_model_itself_runs(always, caplog):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), model(x)) and fast(x).dtype == torch.bfloat16
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(fast(y).sum(), y)
        assert torch.equal(gradient, torch.autograd.grad(model(y).sum(), y)[0])
    warned = [r.getMessage() for r in caplog.records if r.name.startswith("granet")]
    assert sum("autocast" in text for text in warned) == sum("gradient" in text for text in warned) == 1
    assert not fast(x).requires_grad
    with torch.inference_mode():
        close(fast(x), model(x))
    fast.train()
    assert fast(x).requires_grad  # the model itself, in training mode
    fast.eval()
    assert not fast(x).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch itself, at forward mode
def test_transforms_see_the_model_itself(always):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    close(torch.func.vmap(fast)(x[:, None]), model(x[:, None]).detach())
    close(torch.func.grad(lambda y: fast(y).sum())(x), torch.func.grad(lambda y: model(y).sum())(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found, expected = (torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (fast, model))
        close(found, expected)
    exported = torch.export.export(fast, (x,), strict=False)
    close(exported.module()(x), model(x))


def test_a_compiled_model_is_saved_and_copied(always, monkeypatch):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)

    def measured(*args, **named):
        raise AssertionError("measured again")

    monkeypatch.setattr("granet.engine.capture.search", measured)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(fast)):
        assert twin.report(x) == fast.report()
        for _ in range(2):
            close(twin(x), model(x).detach())
        assert counting(twin)(x) == [True]
        change_in_place(twin.model)
        close(twin(x), twin.model(x).detach())
        assert not torch.allclose(twin(x), model(x), atol=1e-3)


def test_what_cannot_be_lowered_runs_as_it_is_with_the_reason(always, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr("granet.engine.capture.lower", broken)
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    assert fast.report().chosen == "dense" and "no such thing" in fast.report().why
    close(fast(x), model(x).detach())
    assert [r for r in caplog.records if r.levelno == logging.WARNING]


def test_errors_of_the_model_are_its_own(always):
    model, x = mlp(), torch.randn(4, 16)
    fast = inference.compile(model, x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fast(torch.randn(4, 5))
    with pytest.raises(TypeError, match="positional"):
        fast(x, x)
    close(fast(x), model(x).detach())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_inputs_run_the_model_itself():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x.dequantize() if x.is_quantized else x)

    x = torch.quantize_per_tensor(torch.randn(2, 4), 0.1, 0, torch.qint8)
    model = Quantised().eval()
    fast = inference.compile(model, x)
    assert fast.report().chosen == "dense" and "quantised" in fast.report().why
    assert torch.equal(fast(x), model(x))


def test_backend_of_torch_compile():
    model, x = mlp(), torch.randn(4, 16)
    fast = torch.compile(model, backend="granet", dynamic=False)
    with torch.no_grad():
        for inputs in (x, x, torch.randn(2, 16)):
            close(fast(inputs), model(inputs))
    y = x.clone().requires_grad_()
    fast(y).sum().backward()
    assert y.grad is not None and model[0].weight.grad is not None
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, name = declared["project"]["entry-points"]["torch_dynamo_backends"]["granet"].partition(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnest14d", 64),
        ("resnetv2_50", 64),
        ("mobilenetv2_050", 64),
        ("mobilenetv3_small_050", 64),
        ("efficientnet_b0", 64),
        ("convnext_atto", 64),
        ("densenet121", 64),
        ("vit_tiny_patch16_224", 224),
    ],
)
def test_models_of_timm(name, size, always):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter where it was built for another torch
        pytest.skip(f'needs pip install "granet[timm]": {error}')
    torch.manual_seed(0)
    model = sparse(timm.create_model(name))
    fast = inference.compile(model, torch.zeros(2, 3, size, size))
    assert fast.report().chosen == "sparse"
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert search.difference(model(x), fast(x)) < 1e-4
