"""Models to measure or to export: of a run, of a catalogue, of somebody's code, or of an ONNX file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from granet import topology
from granet.distribution import named
from granet.lab import onnx_source
from granet.names import described, nearest, unknown
from granet.pattern import parse
from granet.sparsifier.reparameterize import fold
from granet.train.models import MODELS, build
from granet.train.run import Run, load_weights
from granet.train.trainer import Trainer

SIZE = 32  # height and width of the images of granet's own models
KINDS = (
    "a run directory, the name of a model (`granet ls models`), timm:NAME, torchvision:NAME, module:function, "
    "file.py:function, or an ONNX file"
)


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode, in float32 on the CPU, with inputs that it computes.

    Attributes:
        name: what the user called it.
        model: the model.
        example: its positional arguments, with as many examples as were asked for.
        trainer: the trainer of a run, which has its data; None for other models.
        about: what its weights are, in words.
    """

    name: str
    model: nn.Module
    example: tuple[Tensor, ...]
    trainer: Trainer | None = None
    about: str = ""


def read(
    source: str,
    *,
    batch: int | None = None,
    sparsity: float | None = None,
    distribution: str = "erk",
    pattern: str | None = None,
    size: int | None = None,
    checkpoint: str | None = "last",
) -> Source:
    """Returns the model that `source` names.

    Models of granet, timm and torchvision get random weights (nothing is downloaded) and random masks. Models of a
    run, a function or a file keep their weights; a function or file gets random masks only if `sparsity` is given.

    Args:
        source: a run directory; the name of a model of granet; `timm:NAME` or `torchvision:NAME`; `module:function` or
            `file.py:function`, which is called without arguments and returns the model, perhaps with example inputs;
            or an ONNX file, which onnx2torch turns into a model.
        batch: number of examples in the inputs; 1, or as many as a function's own example has, if not given.
        sparsity: sparsity of random masks; 0.9 for a model by name if not given.
        distribution: how that sparsity is distributed over the layers.
        pattern: which masks are allowed, such as `"1x4"`; layers whose shape does not fit are masked without it.
        size: height and width of images; that of the model if not given.
        checkpoint: that of a run: `"last"`, `"best"`, or None for the best if there is one.

    Raises:
        ValueError: `source` is none of these, its model cannot be made or cannot compute its inputs, or a number is
            impossible.
        ModuleNotFoundError: a package is missing; the message says how to install it.
        OSError: there is no such run directory or file.
    """
    check(batch=batch, sparsity=sparsity, size=size)
    path, (before, colon, behind) = Path(source), source.rpartition(":")
    looks_like_a_path = path.exists() or len(path.parts) > 1
    if (path / "recipe.yaml").exists():
        found = _from_run(source, batch or 1, checkpoint)
    elif path.suffix == ".onnx":
        found = _from_onnx(source, batch, size)
    elif colon and before in ("timm", "torchvision"):
        model, shape = (_from_timm if before == "timm" else _from_torchvision)(behind, size)
        found = Source(source, model, _random_images(shape, batch or 1))
    elif colon and behind.isidentifier():
        found = _from_code(source, before, behind, batch, size)
    elif source in MODELS or not looks_like_a_path:
        if source not in MODELS:
            raise ValueError(f"{unknown('model', source, MODELS)}. What can be measured: {KINDS}")
        side = size or SIZE
        found = Source(source, build(source, classes=10, in_channels=3), _random_images((3, side, side), batch or 1))
    else:
        found = _from_run(source, batch or 1, checkpoint)
    model, about = found.model.cpu().float().eval(), found.about
    fold(model)  # the weights that a reparameterised model computes with
    if sparsity is None and not about:
        sparsity = 0.9
    if sparsity is not None and found.trainer is None:
        about = _mask(model, sparsity, distribution, pattern)
    _check_call(source, model, found.example)
    return Source(source, model, found.example, found.trainer, about)


def check(*, batch: int | None = None, sparsity: float | None = None, size: int | None = None, **_: object) -> None:
    """Refuses impossible numbers among the options of `read`, before any work is done.

    Raises:
        ValueError: one is impossible.
    """
    for name, number in (("batch", batch), ("size", size)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1: it is the share of inactive weights")


def _check_call(source: str, model: nn.Module, example: tuple[Tensor, ...]) -> None:
    shapes = " and ".join("x".join(map(str, one.shape)) for one in example)
    try:
        with torch.no_grad():
            output = model(*example)
    except Exception as error:  # of many kinds
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"{source} cannot compute inputs of shape {shapes}: {cause}") from error
    leaves = tree_leaves(output)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(f"{source} returns {described(output)}, and its outputs must be tensors to be compared")


def _random_images(shape: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)),)


def _sized(example: Tensor, batch: int) -> Tensor:
    """Returns `batch` examples: the first of those there are, which are repeated where they are too few."""
    return example[torch.arange(batch) % len(example)]


def _mask(model: nn.Module, sparsity: float, distribution: str, pattern: str | None) -> str:
    """Gives the weights random masks, and the rest of each as much variance as the dense weight had."""
    form = parse(pattern)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 and p.numel()}
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    rng = torch.Generator().manual_seed(0)
    fit = {name: form.shape(shape) for name, shape in shapes.items() if form.misfit(shape) is None}
    rest = {name: shape for name, shape in shapes.items() if name not in fit}
    with topology.obeying(form.order):
        masks = topology.random_masks(named(distribution)(fit, 1 - sparsity), fit, rng) if fit else {}
    masks = {name: form.expanded(mask, shapes[name]) for name, mask in masks.items()}
    if rest:
        masks |= topology.random_masks(named(distribution)(rest, 1 - sparsity), rest, rng)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name]).div_(max(masks[name].float().mean().item(), 1e-9) ** 0.5)
    kind = "" if pattern is None else f" of the pattern {form}"
    return f"random masks{kind}, {distribution} distribution"


def _from_run(source: str, batch: int, checkpoint: str | None) -> Source:
    run = Run.open(Path(source))
    trainer = Trainer(run.recipe, begins=False)
    load_weights(run, trainer, checkpoint)
    trainer.sparsifier.fold()
    trainer.quantisation.remove()
    images = next(iter(trainer.images.spread("train", batch)))[0].cpu()
    averaged = trainer.ema is not None  # then it is the average that `granet eval` evaluates
    about = "the averaged weights of the run" if averaged else "the weights of the run"
    return Source(source, trainer.ema if averaged else trainer.model, (_sized(images, batch),), trainer, about)


def require(package: str, purpose: str, install: str) -> None:
    """Checks that an optional package is installed, before any work is done.

    Raises:
        ModuleNotFoundError: it is not; the message says how to install it.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{purpose} needs {package}: pip install {install}")


def _imported(package: str, purpose: str, install: str) -> Any:
    require(package, purpose, install)
    try:
        return importlib.import_module(package)
    except Exception as error:  # a torchvision that was built for another torch, for example
        raise ValueError(f"{package} is installed and cannot be imported: {type(error).__name__}: {error}") from error


def _from_timm(name: str, size: int | None) -> tuple[nn.Module, tuple[int, ...]]:
    timm = _imported("timm", f"the model timm:{name}", '"granet[timm]"')

    if not timm.is_model(name):
        raise ValueError(_no_such("timm", name, timm.list_models()))
    model = timm.create_model(name, pretrained=False)
    channels, *sides = model.pretrained_cfg["input_size"]
    return model, (channels, size, size) if size else (channels, *sides)


def _from_torchvision(name: str, size: int | None) -> tuple[nn.Module, tuple[int, ...]]:
    torchvision = _imported("torchvision", f"the model torchvision:{name}", "torchvision")
    names = torchvision.models.list_models(module=torchvision.models)  # those that classify images
    if name not in names:
        raise ValueError(_no_such("torchvision", name, names))
    side = size or (299 if name == "inception_v3" else 224)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(name, weights=None, **options), (3, side, side)


def _no_such(package: str, name: str, names: list[str]) -> str:
    near = nearest(name, names, 3)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return f"{package} has no model {name!r} that classifies images{hint}"


def _from_code(source: str, module: str, function: str, batch: int | None, size: int | None) -> Source:
    try:
        made = _callable(source, module, function)()
    except (ValueError, OSError):
        raise
    except Exception as error:  # of many kinds: it is the user's code
        raise ValueError(f"{source} failed: {type(error).__name__}: {error}") from error
    model, *inputs = made if isinstance(made, tuple | list) else (made,)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{source} returns {described(model)}: it must return a torch.nn.Module, or a tuple of one and its inputs"
        )
    if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
        inputs = list(inputs[0])
    if not inputs:
        inputs = list(_random_images(_guessed(source, model, size), batch or 1))
    if not all(isinstance(one, Tensor) and one.dim() and len(one) for one in inputs):
        raise ValueError(f"{source}: the example inputs must be tensors whose first axis is the batch")
    example = tuple(one.detach().cpu() if batch is None else _sized(one.detach().cpu(), batch) for one in inputs)
    return Source(source, model, example, None, "the weights that the function gave")


def _callable(source: str, module: str, function: str) -> Callable[[], Any]:
    path = Path(module)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"{source}: there is no file {module}")
        folder, name = path.resolve().parent, f"granet_source_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded  # as import does; dataclasses and pickling look there
        with _importable(folder):
            spec.loader.exec_module(loaded)
    else:
        with _importable(Path.cwd()):
            try:
                loaded = importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ValueError(f"{source}: {error}. What can be measured: {KINDS}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        names = [name for name, value in vars(loaded).items() if callable(value) and not name.startswith("_")]
        raise ValueError(unknown(f"function of {module}", function, names))
    return found


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets a module's own imports find their neighbours."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _guessed(source: str, model: nn.Module, size: int | None) -> tuple[int, ...]:
    """Returns the shape of one input, as the model's first layer has it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return (module.in_channels, size or SIZE, size or SIZE)
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if next(module.parameters(recurse=False), None) is not None:
            break
    raise ValueError(f"{source} gives no example inputs, and the model's first layer does not tell them: return both")


def _from_onnx(source: str, batch: int | None, size: int | None) -> Source:
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: there is no such file")
    for package in ("onnx", "onnx2torch"):
        _imported(package, "reading an ONNX file", "onnx2torch")
    model, example = onnx_source.read(source, batch, size)
    return Source(source, model, example, None, "the weights of the file")
