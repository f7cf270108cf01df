"""The optimizers attached to a sparsifier, and those inside them: what each holds, and which have stepped.

Optimizers hold other optimizers (SAM, ZeroRedundancyOptimizer, lists of several), and a subclass calls the step of its
parent. All that are real torch optimizers are hooked: gradients are prepared before each step, and a step inside
another one is part of it. With several optimizers, one step of the sparsifier is complete when each of them has
stepped at least once, in any order; what an optimizer steps beyond that belongs to the same step.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet.names import described
from granet.sparsifier import masking, stepping

_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__  # the function of torch's that calls the hooks
_PATIENCE = 100  # steps of one optimizer before a warning that another one does not step


def family(optimizer) -> list[Optimizer]:
    """Returns `optimizer`, if it is one of torch's, and all torch optimizers inside it, outer ones first.

    Found are those in attributes, and in lists, tuples and dicts that are attributes, at any depth. If a
    wrapper shares its hooks with the optimizer that it wraps (Fabric's does), only the latter is returned.
    """
    found: dict[int, Optimizer] = {}
    seen: set[int] = set()

    def visit(holder) -> None:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        hooks = getattr(holder, "_optimizer_step_pre_hooks", None)
        if isinstance(holder, Optimizer) and hooks is not None:
            found[id(hooks)] = holder
        for key, value in list(getattr(holder, "__dict__", {}).items()):
            if key in ("state", "param_groups", "defaults"):
                continue
            inside = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            for one in list(inside):
                if not isinstance(one, Tensor | nn.Module) and hasattr(one, "step") and hasattr(one, "param_groups"):
                    visit(one)

    visit(optimizer)
    return list(found.values())


def families(optimizers: Iterable) -> tuple[Optimizer, ...]:
    """Returns the torch optimizers among `optimizers` and inside them, each once.

    Raises:
        TypeError: one of them is not an optimizer and contains none.
    """
    found: dict[int, Optimizer] = {}
    for one in optimizers:
        members = [] if isinstance(one, nn.Module | Tensor | type) else family(one)
        if not members and isinstance(getattr(one, "optimizer", None), Optimizer):
            members = family(one.optimizer)
        if not members:
            raise TypeError(
                f"attach(...) takes the optimizers of the model, not {described(one)}: "
                "sparsifier.attach(optimizer), or attach(first, second) for several"
            )
        found |= {id(member): member for member in members}
    return tuple(found.values())


@contextmanager
def unhooked(optimizers: Optimizer | Iterable[Optimizer]) -> Iterator[None]:
    """Suspends the step hooks of the optimizers, and of those inside them, within the `with` block."""
    members = families([optimizers] if isinstance(optimizers, Optimizer) else optimizers)
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    held = [(optimizer, name, getattr(optimizer, name)) for optimizer in members for name in names]
    for optimizer, name, _ in held:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for optimizer, name, hooks in held:
            setattr(optimizer, name, hooks)


class Attachment:
    """The optimizers that a sparsifier acts around.

    Args:
        optimizers: the optimizers, or wrappers around them.
        sparse: the sparse parameters by name.
        learned: more parameters that must be held, by name.

    Attributes:
        optimizers: all torch optimizers among the arguments and inside them.

    Raises:
        TypeError: an argument is not an optimizer.
        ValueError: a trained parameter is in none of the optimizers.
    """

    def __init__(self, optimizers: Iterable, sparse: Mapping[str, Tensor], learned: Mapping[str, Tensor] | None = None):
        self.optimizers = families(optimizers)
        if not self.optimizers:
            raise TypeError("attach(...) takes the optimizers of the model: sparsifier.attach(optimizer)")
        self._names = {id(p): name for name, p in sparse.items()}
        self._sparse = sparse
        self._held: dict[int, tuple[int, frozenset[int], list[str]]] = {}
        self._watches: dict[int, masking.Watch] = {}
        self._stepped: set[int] = set()  # parameters, since the last step was complete
        self._awaited: frozenset[int] | None = None
        self._repeated, self._warned = 0, False
        self._handles: list = []
        self.outer = {id(optimizer) for optimizer in self.optimizers if len(family(optimizer)) > 1}
        held = {id(p) for p in stepping.parameters_of(self.optimizers)}
        wanted = {**sparse, **(learned or {})}
        missing = [name for name, p in wanted.items() if id(p) not in held and p.requires_grad]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(
                f"the optimizer does not hold {missing[0]!r}{more}: "
                "build it from the parameters of the model that the sparsifier was given"
            )

    def __deepcopy__(self, memo):
        other = memo[id(self)] = object.__new__(type(self))
        other.__init__(deepcopy(self.optimizers, memo), deepcopy(self._sparse, memo))
        pairs = zip(self.optimizers, other.optimizers, strict=True)
        other._watches = {id(new): deepcopy(self._watches[id(old)]) for old, new in pairs if id(old) in self._watches}
        return other

    def hook(self, sparsifier) -> None:
        """Registers the hooks that make the sparsifier act around every step of the optimizers."""
        for optimizer in self.optimizers:
            before, after = (torch.compiler.disable(partial(act, self, sparsifier)) for act in (_before, _after))
            self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    @property
    def hooked(self) -> bool:
        """Whether hooks are registered, so that the loop need not call the sparsifier."""
        return bool(self._handles)

    def release(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _holding(self, optimizer: Optimizer) -> tuple[int, frozenset[int], list[str]]:
        """How many parameters the optimizer holds, which, and the names of the sparse ones."""
        number = sum(len(group["params"]) for group in optimizer.param_groups)
        found = self._held.get(id(optimizer))
        if found is None or found[0] != number:  # groups can be added
            held = frozenset(id(p) for p in stepping.parameters_of([optimizer]))
            found = self._held[id(optimizer)] = number, held, [self._names[p] for p in self._names if p in held]
        return found

    def names(self, optimizer: Optimizer) -> list[str]:
        """The names of the sparse parameters that `optimizer` holds."""
        return self._holding(optimizer)[2]

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Returns whether the optimizer has stepped since the last complete step."""
        return not self._stepped.isdisjoint(self._holding(optimizer)[1])

    def record_step(self, optimizer: Optimizer) -> bool:
        """Records that `optimizer` has stepped, and returns whether all have: then the step is complete."""
        held = self._holding(optimizer)[1]
        if self._awaited is None:
            self._awaited = frozenset(id(p) for p in stepping.parameters_of(self.optimizers) if p.requires_grad)
        self._repeated += not self._stepped.isdisjoint(held)
        self._stepped |= held
        if self._awaited <= self._stepped:
            self.begin()
            return True
        if self._repeated == _PATIENCE and not self._warned:
            self._warned = True
            late = [o for o in self.optimizers if not self._awaited.isdisjoint(self._holding(o)[1] - self._stepped)]
            which = next((f" (it holds {names[0]!r})" for o in late if (names := self.names(o))), "")
            warnings.warn(
                f"{type(late[-1]).__name__}{which} was attached and has not stepped for {_PATIENCE} steps of another "
                "optimizer. A step of the sparsifier is complete when every attached optimizer has stepped, so none "
                "is counted and the topology stays. Leave out of attach(...) what is not stepped, or give parts of "
                "the model that are trained at different times a Sparsifier each",
                RuntimeWarning,
                stacklevel=6,
            )
        return False

    def begin(self) -> None:
        """Begins a new step: every optimizer is expected to step again."""
        self._stepped, self._awaited, self._repeated = set(), None, 0

    def watch(self, optimizer: Optimizer) -> masking.Watch:
        """Returns the record of whether this optimizer keeps inactive weights at zero."""
        return self._watches.setdefault(id(optimizer), masking.Watch())

    def reset(self) -> None:
        """Forgets which optimizers keep inactive weights at zero, and begins a new step."""
        self._watches = {}
        self.begin()

    def renew(self) -> None:
        """Starts anew after the masks have changed: each optimizer has to show again that it keeps the zeros."""
        for watch in self._watches.values():
            watch.renew()

    @property
    def kept(self) -> bool | None:
        """Whether the optimizers keep inactive weights at zero by themselves; None until that is known."""
        known = [watch.kept for watch in self._watches.values()]
        return False if False in known else None if None in known or not known else True

    def is_inside(self) -> bool:
        """Returns whether the step whose hook is being called happens inside a step of another of these optimizers."""
        mine = {id(optimizer) for optimizer in self.optimizers}
        frame: FrameType | None = sys._getframe(1)
        steps = 0
        while frame is not None:
            code = frame.f_code
            if code is _STEP or (code.co_filename == _STEP.co_filename and code.co_name == _STEP.co_name):
                steps += id(frame.f_locals.get("self")) in mine
            frame = frame.f_back
        return steps > 1


def _before(attachment: Attachment, sparsifier, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple | None:
    """The hook before `optimizer.step(*args, **kwargs)`; it makes the sparsifier act once gradients are final.

    At once, unless the step is given a closure: the closure computes the gradients, so they are prepared after it.
    """
    inside = attachment.is_inside()
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
    if not callable(closure):
        sparsifier._ready(optimizer, final=not inside)
        return None
    if id(optimizer) in attachment.outer:  # it may use the gradients that are there already (SAM)
        sparsifier._mask(attachment.names(optimizer))
    wrapped = partial(stepping.then, closure, partial(sparsifier._ready, optimizer, final=not inside))
    return ((optimizer, wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})


def _after(attachment: Attachment, sparsifier, optimizer: Optimizer, *_) -> None:
    if not (attachment.is_inside() or stepping.found_inf(optimizer)):
        sparsifier._stepped(optimizer)
