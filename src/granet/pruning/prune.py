"""`granet.prune`: a trained model made sparse in one shot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from granet import distribution
from granet.filters import Filters
from granet.names import described, unknown
from granet.pattern import NM, Pattern, parse
from granet.pruning import layers, stream, wanda
from granet.pruning.layers import Moment, Target
from granet.pruning.magnitude import Magnitude
from granet.pruning.owl import OWL
from granet.pruning.sparsegpt import SparseGPT
from granet.pruning.wanda import Wanda
from granet.text import columns


class OneShot(Protocol):
    """A method of one-shot pruning: a frozen value that prunes one matrix at a time."""

    calibrated: bool

    def prune(self, weight: Tensor, moment: Tensor, n: int, pattern: NM | None) -> Tensor:
        """Returns the pruned weight of shape (outputs, inputs), a copy."""
        ...


METHODS: dict[str, Callable[[], OneShot]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}


@dataclass(frozen=True)
class Pruned:
    """A layer that was pruned.

    Attributes:
        name: of its weight.
        shape: of its weight.
        active: the number of its weights that are not zero now.
        error: the norm of the change of its outputs on the calibration data, as a share of the norm of the dense
            layer's outputs on the same inputs, the bias left out; None without calibration data.
        tokens: how many inputs it saw in calibration.
    """

    name: str
    shape: tuple[int, ...]
    active: int
    error: float | None
    tokens: int

    @property
    def density(self) -> float:
        """The share of weights that are not zero."""
        return self.active / prod(self.shape)


@dataclass(frozen=True)
class Report:
    """What was pruned. `str()` gives a table of the layers.

    Attributes:
        method: the method with its settings.
        pattern: the pattern of the masks.
        layers: the pruned layers, in the order in which they were pruned.
        dense: the number of all other parameters, biases included.
    """

    method: OneShot
    pattern: Pattern
    layers: tuple[Pruned, ...]
    dense: int

    @property
    def active(self) -> int:
        """The number of weights in pruned layers that are not zero."""
        return sum(layer.active for layer in self.layers)

    @property
    def total(self) -> int:
        """The number of weights in pruned layers."""
        return sum(prod(layer.shape) for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The share of zeros in the pruned layers."""
        return 1 - self.active / self.total

    def __str__(self) -> str:
        rows = [["layer", "shape", "weights", "active", "density", "error"]]
        for layer in self.layers:
            found = "" if layer.error is None else f"{layer.error:.2%}"
            shape = "x".join(map(str, layer.shape))
            rows.append(
                [layer.name, shape, f"{prod(layer.shape):,}", f"{layer.active:,}", f"{layer.density:.1%}", found]
            )
        rows.append(["pruned layers", "", f"{self.total:,}", f"{self.active:,}", f"{self.active / self.total:.1%}", ""])
        rows.append(["other parameters", "", f"{self.dense:,}", "dense", "", ""])
        if all(layer.error is None for layer in self.layers):
            rows = [row[:-1] for row in rows]
        patterned = f", pattern {self.pattern}" if self.pattern.order else ""
        return f"{self.method!r}{patterned}\n\n{columns(rows, right=(2, 3, 4, 5))}"


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    method: str | OneShot = "wanda",
    calibration: Any = None,
    *,
    pattern: Pattern | str | None = None,
    budgets: str | OWL = "uniform",
    only: Filters = None,
    skip: Filters = (),
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Prunes a trained model in one shot, without training; returns a report.

    The weights are changed in place: pruned ones are zero, and `granet.Fixed` keeps them so in fine-tuning. A model
    with a list of blocks, as language models of transformers have, is pruned block by block. Each block is calibrated
    on what the pruned blocks before it give, and beside the model only one block's activations and second moments are
    in memory.

    Args:
        model: the model. By default the layers are pruned that `granet.plan` shows as sparse, and the transposed linear
            layers of GPT-2; embeddings and the output layer of a language model stay dense.
        sparsity: the share of these layers' weights that become zero, above 0 and below 1; the counts are exact. Under
            a pattern N:M it is 1 - N/M and may be left out.
        method: "magnitude", "wanda" or "sparsegpt", or one with settings such as
            `granet.pruning.SparseGPT(dampening=0.1)`.
        calibration: batches of inputs: tensors, or tuples and lists whose first element counts, as data loaders give
            them, or mappings of arguments by name. For a language model, token ids of shape (batch, length), without
            padding, because every position counts. Magnitude pruning does without.
        pattern: an N:M pattern such as "2:4", along the inputs of each output; None for any mask.
        budgets: how the active weights are distributed over the layers: "uniform"; "owl", or `granet.pruning.OWL` with
            settings; or any distribution of `granet.distribution`, "erk" for example.
        only: filters of what is pruned; see `granet.selection`.
        skip: filters of what stays dense.
        progress: called with the number of layers done and that of all, after each layer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument does not fit the others or the model, or activations are NaN or infinite. The message
            says which, and what to do. In a model that is one list of blocks nothing has been changed then.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> print(prune(model, 0.75, "wanda", torch.randn(256, 64)))
    Wanda()
    <BLANKLINE>
    layer             shape  weights  active  density   error
    ---------------------------------------------------------
    0.weight          32x64    2,048     512    25.0%  ...
    2.weight          8x32       256      64    25.0%  ...
    pruned layers              2,304     576    25.0%
    other parameters              40   dense
    """
    method, sparsity, pattern, budgets = settings(sparsity, method, calibration is not None, pattern, budgets)
    found = layers.targets(model, only, skip, pattern, calibration is not None)
    shapes = {target.name: target.shape for target in found}
    reports: dict[str, Pruned] = {}

    def finish(target: Target, moment: Moment | None, n: int) -> None:
        reports[target.name] = _pruned(target, moment, n, method, pattern)
        if progress is not None:
            progress(len(reports), len(found))

    if calibration is None:
        counts = _counts(shapes, sparsity, pattern, budgets)
        for target in found:
            finish(target, None, counts[target.name])
    else:
        with stream.quiet(model):
            batches = stream.calls(calibration, found[0].parameter.device)
            stages = stream.order(model, batches[0], found)
            if isinstance(budgets, OWL):
                counts = _weighed(budgets, model, batches, stages, shapes, 1 - sparsity)
            else:
                counts = _counts(shapes, sparsity, pattern, budgets)
            for stage, moments in stream.walk(model, batches, stages):
                for target in stage.targets:
                    finish(target, moments.pop(target.name), counts[target.name])
    dense = sum(p.numel() for p in model.parameters()) - sum(prod(shape) for shape in shapes.values())
    return Report(method, pattern or parse(None), tuple(reports.values()), dense)


def _pruned(target: Target, moment: Moment | None, n: int, method: OneShot, pattern: NM | None) -> Pruned:
    """Prunes one layer."""
    if moment is not None and not moment.count:
        warnings.warn(
            f"no calibration data reached {target.name!r}: it is pruned as if all its inputs were alike",
            RuntimeWarning,
            stacklevel=4,
        )
    weight, inputs = target.matrix(), None if moment is None else moment.mean()
    try:
        pruned = method.prune(weight, inputs, n, pattern)
    except ValueError as problem:
        raise ValueError(f"{target.name!r}: {problem}") from problem
    target.write(pruned)
    change = None if moment is None or not moment.count else layers.error(weight, pruned, inputs)
    active = int(torch.count_nonzero(target.parameter))
    return Pruned(target.name, tuple(target.parameter.shape), active, change, moment.count if moment else 0)


def _counts(shapes: distribution.Shapes, sparsity: float, pattern: NM | None, budgets: str) -> dict[str, int]:
    if pattern:
        return {name: prod(shape) // pattern.m * pattern.n for name, shape in shapes.items()}
    return distribution.named(budgets)(shapes, 1 - sparsity)


def _weighed(
    owl: OWL, model, batches, stages: Sequence[Sequence[stream.Stage]], shapes, density: float
) -> dict[str, int]:
    """The budgets of OWL: one more pass through the dense model, in which the norms of all inputs are taken."""
    blocks = {stage.name: stage.targets for chain in stages for stage in chain if stage.targets}
    with layers.observed([target for targets in blocks.values() for target in targets], diagonal=True) as moments:
        for args, kwargs in batches:
            model(*args, **kwargs)
    ratios = {}
    for block, targets in blocks.items():
        ratios[block] = owl.ratio([wanda.scores(target.matrix(), moments[target.name].mean()) for target in targets])
    sizes = {block: sum(target.parameter.numel() for target in targets) for block, targets in blocks.items()}
    densities = owl.densities(ratios, sizes, density)
    each = {target.name: densities[block] for block, targets in blocks.items() for target in targets}
    return distribution.proportional(shapes, density, each)


class Settings(NamedTuple):
    """What `prune` was asked for, checked; its fields are those arguments."""

    method: OneShot
    sparsity: float
    pattern: NM | None
    budgets: str | OWL


def settings(sparsity, method, calibrated: bool, pattern, budgets) -> Settings:
    """Returns the arguments of `prune` as values; `calibrated` says whether there is calibration data.

    Raises:
        TypeError: one has the wrong type.
        ValueError: one is impossible, or they do not fit each other.
    """
    method, pattern, budgets = _method(method), _pattern(pattern), _budgets(budgets)
    sparsity = _sparsity(sparsity, pattern)
    if pattern and budgets != "uniform":
        raise ValueError(f"pattern {pattern} gives every layer the same density: leave budgets={budgets!r} out")
    if not calibrated and (method.calibrated or isinstance(budgets, OWL)):
        which = method if method.calibrated else budgets
        raise ValueError(
            f"{type(which).__name__} looks at activations: give calibration=, a few batches of inputs of the model "
            "(128 pieces of text in the papers), or choose method='magnitude' with budgets='uniform'"
        )
    return Settings(method, sparsity, pattern, budgets)


def _method(method: str | OneShot) -> OneShot:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS) + "; methods that train go to granet.Sparsifier")
        return METHODS[method]()
    if isinstance(method, type) or not hasattr(method, "calibrated"):
        raise TypeError(
            f"the method is {described(method)}: give one of {', '.join(METHODS)}, or a value such as "
            "granet.pruning.Wanda(); methods that train, such as granet.GMP, go to granet.Sparsifier"
        )
    return method


def _pattern(pattern: Pattern | str | None) -> NM | None:
    found = parse(pattern)
    if isinstance(found, NM):
        return found
    if str(found) != "unstructured":
        raise ValueError(
            f"pattern {found} is not for one-shot pruning: choose 'unstructured' or 'N:M' such as '2:4', or prune "
            "gradually with granet.Sparsifier(model, granet.GMP(...), pattern=...)"
        )
    return None


def _budgets(budgets: str | OWL) -> str | OWL:
    if isinstance(budgets, OWL):
        return budgets
    if not isinstance(budgets, str):
        raise TypeError(f"budgets= is {described(budgets)}: give a name such as 'uniform' or 'owl', or an OWL(...)")
    if budgets == "owl":
        return OWL()
    if "=" not in budgets and budgets not in distribution.DISTRIBUTIONS:
        raise ValueError(unknown("budgets", budgets, [*distribution.DISTRIBUTIONS, "owl"]))
    return budgets


def _sparsity(sparsity: float | None, pattern: NM | None) -> float:
    if pattern:
        own = 1 - pattern.n / pattern.m
        if sparsity is not None and abs(sparsity - own) > 1e-9:
            raise ValueError(f"pattern {pattern} has a sparsity of {own:.6g}: leave sparsity={sparsity} out")
        return own
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity is {described(sparsity)}: give a number above 0 and below 1, or a pattern N:M")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: give a number above 0 and below 1")
    return sparsity
