"""Walking through a model block by block, so that only one block's activations and moments exist at a time.

A chain is a list of modules, the decoder blocks of a language model for example, of which each is called once, on what
the one before it returned. The activations in front of the chain are kept for all calibration batches. Each block is
run on them twice: dense, while its layers' inputs are observed, and pruned, to get the activations in front of the next
block. Layers outside of chains are observed one at a time while the whole model runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from granet.names import described
from granet.pruning.layers import Moment, Target, observed

log = logging.getLogger(__name__)

Call = tuple[tuple, dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True, eq=False)
class Stage:
    """What is pruned at a time: a block of a chain, or a layer outside of chains.

    Attributes:
        name: of the block, or of the layer's weight.
        targets: the weights to be pruned in it.
        module: the block; None for a layer, which is observed while the whole model runs.
    """

    name: str
    targets: tuple[Target, ...]
    module: nn.Module | None = None


@dataclass(eq=False)
class Chain:
    """Modules that might be called one after the other; `order` finds out."""

    stages: list[Stage]
    place: int = 0  # how many have been called
    broken: bool = False
    last: Tensor | None = field(default=None, repr=False)

    @property
    def layers(self) -> int:
        """The number of layers to be pruned in all blocks."""
        return sum(len(stage.targets) for stage in self.stages)

    @property
    def sound(self) -> bool:
        """Whether each module was called once, on what the one before it returned."""
        return not self.broken and self.place == len(self.stages) and self.last is not None

    def enter(self, i: int, hidden: Tensor | None) -> None:
        """Takes note that module `i` is called on `hidden`."""
        same = i == 0 or (hidden is not None and self.last is not None and _equal(hidden, self.last))
        self.broken |= i != self.place or hidden is None or not same
        self.place, self.last = i + 1, None

    def leave(self, output: Any) -> None:
        """Takes note of what a module returned."""
        self.last = None if self.broken else _hidden_of_output(output)


def calls(batches: Any, device: torch.device) -> list[Call]:
    """Returns the arguments of the model for each calibration batch.

    Raises:
        ValueError: there is no batch, or one is neither a tensor nor holds tensors.
    """
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    found = []
    for batch in batches:
        if isinstance(batch, Mapping):
            given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
            found.append(((), given))
            continue
        first = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(first, Tensor):
            raise ValueError(
                f"a calibration batch is {described(batch)}: give a tensor, a tuple or list that begins with one, "
                "or a mapping of the model's arguments by name"
            )
        found.append(((first.to(device),), {}))
    if not found:
        raise ValueError("there is no calibration data: give at least one batch")
    return found


@contextmanager
def quiet(model: nn.Module):
    """The model in evaluation mode, without gradients and without a cache of keys and values; as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    found = (getattr(module, "config", None) for module in modes)  # T5's decoder has one of its own
    caching = {id(config): config for config in found if getattr(config, "use_cache", None) is True}.values()
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, training in modes.items():
            module.training = training


def order(model: nn.Module, call: Call, targets: Sequence[Target]) -> list[list[Stage]]:
    """Returns what to prune one after the other: chains of blocks, and single layers, in the order of the first call.

    Of several chains that hold the same layers, the one with the most layers is taken, the outermost of equal ones; a
    chain does not count if one of its blocks has more than half of its layers.

    Args:
        model: the model, which is run once.
        call: its arguments.
        targets: the weights to be pruned.
    """
    chains = list(_candidates(model, targets))
    first: dict[int, int] = {}  # id of a module to the time of its first call

    def note(module: nn.Module, *_: Any) -> None:
        first.setdefault(id(module), len(first))

    with ExitStack() as stack:
        for target in targets:
            for module in target.modules:
                stack.enter_context(_hooked(module.register_forward_pre_hook(note)))
        for chain in chains:
            for i, stage in enumerate(chain.stages):
                stack.enter_context(
                    _hooked(stage.module.register_forward_pre_hook(_entering(chain, i), with_kwargs=True))
                )
                stack.enter_context(_hooked(stage.module.register_forward_hook(_leaving(chain))))
        model(*call[0], **call[1])
    sound = [chain for chain in chains if chain.sound]
    found, taken = [], set()
    for chain in sorted(sound, key=lambda chain: -chain.layers):
        names = {target.name for stage in chain.stages for target in stage.targets}
        if not names & taken:
            found.append(chain.stages)
            taken |= names
    found += [[Stage(target.name, (target,))] for target in targets if target.name not in taken]

    def begins(stages: list[Stage]) -> int:
        modules = (module for stage in stages for target in stage.targets for module in target.modules)
        return min(first.get(id(module), len(first)) for module in modules)

    return sorted(found, key=begins)


def walk(
    model: nn.Module, batches: Sequence[Call], stages: Sequence[Sequence[Stage]]
) -> Iterator[tuple[Stage, dict[str, Moment]]]:
    """Yields each stage with the moments of its layers' inputs by name; the caller prunes it before it goes on.

    Raises:
        ValueError: activations are NaN or infinite.
    """
    alone = sum(chain[0].module is None for chain in stages)
    if alone:
        log.info("%d layers are in no list of blocks, and the whole model runs for each of them", alone)
    for chain in stages:
        if chain[0].module is None:
            (stage,) = chain
            with observed(stage.targets) as moments:
                for args, kwargs in batches:
                    model(*args, **kwargs)
            yield stage, moments
            continue
        hidden, others = _captured(model, batches, [stage.module for stage in chain])
        last = max(i for i, stage in enumerate(chain) if stage.targets)
        for i, stage in enumerate(chain[: last + 1]):
            if stage.targets:
                with observed(stage.targets) as moments:
                    for x, call in zip(hidden, others[i], strict=True):
                        _run(stage.module, x.clone(), call)
                yield stage, moments
                del moments
            if i < last:
                for b, call in enumerate(others[i]):
                    hidden[b] = _hidden_of_output(_run(stage.module, hidden[b], call))
            others[i] = []


class _Enough(Exception):  # noqa: N818  (no error: what was wanted has been seen)
    """The last block of a chain has been run, and what comes after it does not matter."""


def _captured(
    model: nn.Module, batches: Sequence[Call], blocks: Sequence[nn.Module]
) -> tuple[list[Tensor], list[list[Call]]]:
    """Returns the activations in front of the first block for each batch, and for each block its other arguments.

    Arguments that are the same for all blocks or batches, masks and positions, are kept once.
    """
    hidden: list[Tensor] = []
    others: list[list[Call]] = [[] for _ in blocks]
    second: list[Tensor] = []  # what the second block got of the first batch

    def enter(i: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if i == 0:
                hidden.append(_hidden(args, kwargs).clone())
            call = _with(args, kwargs, None)
            others[i].append(_sharing(call, others[i][0]) if others[i] else call)
            if i == 1 and not second:
                second.append(_hidden(args, kwargs).clone())

        return hook

    def enough(module: nn.Module, args: tuple, output: Any) -> None:
        if not _hidden_of_output(output).isfinite().all():
            raise ValueError(
                f"the model's activations are NaN or infinite on calibration batch {len(hidden) - 1}, counted from 0: "
                "leave it out, or load the model in a wider dtype such as bfloat16 or float32"
            )
        raise _Enough

    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.enter_context(_hooked(block.register_forward_pre_hook(enter(i), with_kwargs=True)))
        stack.enter_context(_hooked(blocks[-1].register_forward_hook(enough)))
        for args, kwargs in batches:
            with suppress(_Enough):
                model(*args, **kwargs)
    again = _hidden_of_output(_run(blocks[0], hidden[0].clone(), others[0][0]))
    if not torch.allclose(again.to(second[0].device), second[0], rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"a {type(blocks[0]).__name__} gives other outputs when it is run a second time on the same inputs, so it "
            "keeps something from one call to the next: turn that off (a cache of keys and values is, use_cache=False)"
        )
    return hidden, others


def _candidates(model: nn.Module, targets: Sequence[Target]) -> Iterator[Chain]:
    """Yields the lists of modules none of which has more than half of the weights to be pruned in the list."""
    owner_of = {id(module): target for target in targets for module in target.modules}
    for name, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        stages: list[Stage] = []
        for leaf, module in container._modules.items():
            inside = {id(one) for one in module.modules()}
            mine = {t.name: t for one in module.modules() if (t := owner_of.get(id(one)))}
            whole = [t for t in targets if t.name in mine and all(id(m) in inside for m in t.modules)]
            stages.append(Stage(f"{name}.{leaf}" if name else leaf, tuple(whole), module))
        chain = Chain(stages)
        if 2 * max((len(stage.targets) for stage in stages), default=0) <= chain.layers > 0:
            yield chain


@contextmanager
def _hooked(handle: Any):
    try:
        yield
    finally:
        handle.remove()


def _entering(chain: Chain, i: int):
    return lambda module, args, kwargs: chain.enter(i, _hidden(args, kwargs))


def _leaving(chain: Chain):
    return lambda module, args, output: chain.leave(output)


def _run(module: nn.Module, hidden: Tensor, call: Call) -> Any:
    args, kwargs = _with(*call, hidden)
    return module(*args, **kwargs)


def _hidden(args: tuple, kwargs: Mapping) -> Tensor | None:
    """The activations among the arguments of a block: its first."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return first if isinstance(first, Tensor) else None


def _with(args: tuple, kwargs: Mapping, hidden: Tensor | None) -> Call:
    """The same arguments with other activations."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return (), {**kwargs, next(iter(kwargs)): hidden}


def _sharing(call: Call, first: Call) -> Call:
    """The same arguments, with the tensors of `first` in the place of equal ones."""
    (mine, form), (others, other_form) = tree_flatten(call), tree_flatten(first)
    if form != other_form:
        return call
    pairs = zip(mine, others, strict=True)
    same = [b if isinstance(a, Tensor) and isinstance(b, Tensor) and _equal(a, b) else a for a, b in pairs]
    return tree_unflatten(same, form)


def _hidden_of_output(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, list | tuple) and output else output
    return first if isinstance(first, Tensor) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
