"""Keeps inactive weights, their gradients and their optimizer state at zero.

After every step, whichever way it was taken, inactive weights and their optimizer state are zero. Where that cannot be
guaranteed there is an error, or one warning that says what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import checks, shards
from granet.criterion import Layer
from granet.methods.base import Method
from granet.pattern import Pattern
from granet.selection import Choice
from granet.sparsifier import followers, masking, ownership, regrowth, state, stepping
from granet.sparsifier.attachment import Attachment
from granet.sparsifier.by_hand import ByHand
from granet.sparsifier.ever import EverActive
from granet.sparsifier.records import Update
from granet.sparsifier.reparameterize import Reparameterization
from granet.sparsifier.sparse_storage import SparseStorage
from granet.topology import count

_LOOKS_PER_STEP = 8  # parameters that are checked in each step
_MAX_LOOKS = 100  # steps of optimizers that are not attached after which they are checked
_NOT_ATTACHED = (
    "moved inactive weights away from zero and is not attached: nothing masks its gradients, and the model becomes "
    "dense. Call sparsifier.attach(optimizer) with every optimizer of the model before the first step, or "
    "sparsifier.detach() if the masks shall no longer hold"
)


class Upkeep(ByHand):
    """The part of a `Sparsifier` that keeps inactive weights at zero. It applies masks, but never chooses them."""

    model: nn.Module
    _method: Method
    pattern: Pattern
    masks: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    step: int
    last_update: Update | None
    _choices: list[Choice]
    _folded: bool

    def __init__(self, model: nn.Module, pattern: Pattern, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self.model, self.pattern, self._parameters = model, pattern, dict(parameters)
        self._attached: Attachment | None = None
        self._effective: Reparameterization | None = None  # of a method that reparameterizes, until it is folded
        self._stored = SparseStorage()  # the layers in sparse storage, whose inactive weights do not exist
        self._ever, self._total = EverActive({}), sum(p.numel() for p in parameters.values())
        self._gradients: dict[str, Tensor] = {}  # dense ones, gathered from step to step by the method's gradient_mix
        self._taken: set[str] = set()  # parameters whose gradients of the coming step are gathered already
        self._memory: dict[str, Tensor] = {}  # what the method remembers from update to update
        self._followers: list = []
        self._aside: state.Aside | None = state.Aside()  # None from the first step on
        self._trainable = [name for name, p in self._parameters.items() if p.requires_grad]  # at first
        self._next_look = 0  # the position in `masks` at which the next check begins
        self._warned: set[str] = set()  # kinds of warnings that were given
        self._unattached_looks = 0  # checks of optimizers that are not attached, so far
        self._detached = False  # whether detach() was called

    def _set_masks(self, masks: Mapping[str, Tensor], memory: Mapping[str, Tensor] | None = None) -> None:
        """Makes `masks` the current ones, on the devices of the parameters; weights are not cleared yet."""
        self.masks = {
            name: masks[name].to(p.device) if name in self._stored else masking.like(masks[name], p)
            for name, p in self._parameters.items()
        }
        self._active = {name: count(mask) for name, mask in self.masks.items()}
        self._devices = {name: mask.device for name, mask in self.masks.items()}
        if self._effective is not None:
            self._memory = self._effective.renew(self.masks, memory)
        # where training moves weights: all else is kept clear of gradients, and of what optimizers remember
        self.trained = self.masks if self._effective is None else self._effective.trained()
        dense = {name: self.trained[name] for name in self.trained if name not in self._stored}
        self._masked = {name: mask for name, mask in dense.items() if count(mask) < mask.numel()}

    def _store(self) -> None:
        """Puts the layers that can be into sparse storage."""
        self._stored = SparseStorage.of(self.model, self._choices, self.masks)
        self._take_over(self._stored.parameters)
        self._stored.listen(self)

    def _unstore(self) -> None:
        """Gives layers in sparse storage, and those of followers, dense weights again; the optimizers are let go."""
        self.detach()
        dense, self._stored = self._stored.unstore((self.model, *self._followers)), SparseStorage()
        self._take_over(dense)
        self._folded = True

    def _take_over(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Goes on with other parameters of the same names, and lets those before go."""
        self._parameters |= parameters
        self._choices = [replace(one, parameter=self._parameters[one.name]) for one in self._choices]
        ownership.claim(self, self._parameters.values())
        self._set_masks(self.masks)
        self._compact()

    def _compact(self) -> None:
        """Lets masks go that the positions of the layers in sparse storage say as well."""
        if self._stored:
            self.masks = self.trained = self._stored.compact(self.masks)

    def _carry(self, old: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
        """Gives grown weights their places in the optimizers' buffers, and in sparse storage moves all values.

        Args:
            old: the masks before the update.
            trained: where training moved weights before it.
        """
        optimizers = self._attached.optimizers if self._attached is not None else ()
        dense = {name: self.trained[name] for name in self.trained if name not in self._stored}
        grads = self._gradients if self.method.needs_dense_grad else {}  # those by which weights were grown
        regrowth.warm(optimizers, self._parameters, trained, dense, grads)
        self._stored.renew(old, self.masks, optimizers, self._followers)
        self._compact()
        if self._attached is not None:
            self._attached.renew()

    def _combine_gradients(self) -> None:
        """Has all ranks look at the same dense gradients of layers in sparse storage."""
        self._warn("cut", self._stored.combine_gradients())

    def _drift(self, layers: Mapping[str, Layer], rng: torch.Generator) -> None:
        """Moves the active weights as the method says."""
        lr = stepping.learning_rates(self._attached.optimizers, self._parameters)  # of a frozen parameter 0
        for name, change in self.method.drift(self.step, layers, self.masks, rng, lr, self._memory).items():
            self._parameters[name].detach().add_(change.mul(self.masks[name]))

    def _move(self) -> None:
        """Moves masks, kept gradients and memory to where the parameters are now, after `model.to(device)` say."""
        self._ever.move(self._parameters, lambda masks: state.moved(masks, self._parameters))
        self._gradients, self._memory = (state.moved(p, self._parameters) for p in (self._gradients, self._memory))
        self._set_masks(self.masks, self._memory)
        self._compact()
        self._taken = set()
        if self._attached is not None:
            self._attached.reset()

    @property
    def method(self) -> Method:
        """The method that decides the topology. It cannot be exchanged."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        raise AttributeError(
            "a sparsifier keeps its method. To go on with another one: call detach(), make "
            "Sparsifier(model, method, masks=sparsifier.masks), and attach that to the optimizer"
        )

    @property
    def total(self) -> int:
        """The number of weights that take part, active or not."""
        return self._total

    @property
    def active(self) -> int:
        """The number of active weights."""
        return sum(self._active.values())

    @property
    def exploration(self) -> float:
        """R_s, the share of the sparse parameters' weights that were ever active (ITOP, Liu et al. 2021)."""
        return self._ever.count() / self.total

    @property
    def active_units(self) -> int:
        """The number of active units: weights, blocks or channels, depending on the pattern."""
        return sum(count(self.pattern.pooled_mask(mask)) for mask in self.masks.values())

    @property
    def counts(self) -> dict[str, int]:
        """The number of active weights of every sparse parameter."""
        return dict(self._active)

    @property
    def sparsity(self) -> float:
        """The share of inactive weights among the sparse parameters."""
        if self._attached is None:
            self._check_zeros()
        return 1 - self.active / self.total

    @property
    def attached(self) -> bool:
        """Whether the sparsifier acts around the steps of optimizers."""
        return self._attached is not None

    def follow(self, follower) -> None:
        """Keep a copy or an average of the weights sparse as well.

        Args:
            follower: a copy of the model, `torch.optim.swa_utils.AveragedModel` or another wrapper around one; or a
                dict of tensors by name, a list of tensors in the order of `model.parameters()`, or an object with such
                a list as `shadow_params` (diffusers' EMAModel).

        Raises:
            TypeError: `follower` is none of these.
            ValueError: `follower` lacks a sparse parameter, or the effective weights that the model has.
        """
        self._clear_copy(follower, only_look=self._aside is not None)
        self._followers.append(follower)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of inactive weights to zero."""
        self._mask(self._masked)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients down if the norm of those of active weights exceeds `max_norm`; returns that norm.

        The norm leaves out gradients of inactive weights, which would clip a sparse network several times too hard.
        They are scaled by the same factor and stay available to an update.
        """
        if self._attached is None:
            raise RuntimeError("attach(optimizer) comes first: it says which gradients to clip")
        masks = {self._parameters[name]: mask for name, mask in self._masked.items()}
        return stepping.clip(stepping.parameters_of(self._attached.optimizers), masks, max_norm)

    def _mask(self, names: Iterable[str]) -> None:
        held = ((self._masked[name], self._parameters[name].grad) for name in names if name in self._masked)
        masking.clear((mask, [grad]) for mask, grad in held if grad is not None)

    def _clear_all(self) -> None:
        aside = self._aside is not None and self._effective is None
        with self._aside.taking(self._masked, self._parameters) if aside else nullcontext():
            masking.clear(self._held())
        for follower in self._followers:
            self._clear_copy(follower)

    def _held(self, names: Iterable[str] | None = None):
        """Returns each mask with its weight (unless a method keeps inactive weights) and the optimizer state of it."""
        optimizers = self._attached.optimizers if self._attached else ()
        for name in self._masked if names is None else names:
            p = self._parameters[name]
            weights = [p.detach()] if self._effective is None else []
            yield self._masked[name], [*weights, *stepping.buffers(optimizers, p)]

    def _weights(self):
        """Returns each mask with its weight, leaving out weights whose method keeps the inactive values."""
        if self._effective is None:
            yield from ((mask, [self._parameters[name].detach()]) for name, mask in self._masked.items())

    def _clear_copy(self, follower, *, only_look: bool = False) -> None:
        if self._effective is not None:
            return self._effective.put(follower, self._memory)
        self._stored.follow(follower)
        named = followers.tensors_of(follower, self.model, [name for name in self.masks if name not in self._stored])
        if not only_look:
            masking.clear((masking.like(self.masks[name], named[name]), [named[name]]) for name in self._masked)

    @torch.no_grad()
    def _settle(self, optimizer: Optimizer) -> None:
        """Clears the inactive weights that `optimizer` has moved, and their state in it."""
        masks = {name: self._masked[name] for name in self._attached.names(optimizer) if name in self._masked}
        moves = partial(stepping.moves, [optimizer])
        if masks and self._attached.watch(optimizer).settle(moves, masks, self._held):
            self._warn(
                "found",
                f"at step {self.step + 1} inactive weights, or what {type(optimizer).__name__} remembers of them, were "
                "no longer zero, though its earlier steps had kept them so. They have been set to zero, and are from "
                "now on after every step. If dense weights were loaded, what was loaded at inactive places is lost; if "
                "another optimizer or a wrapper around this one moves weights, attach it as well",
            )

    def _look(self, *, everywhere: bool) -> None:
        """Checks that the parameters still belong to the model and the masks lie on their device, a few at each step.

        Raises:
            RuntimeError: a parameter was replaced.
        """
        names = list(self._parameters)
        some = names if everywhere else (names[self._next_look :] + names)[: min(_LOOKS_PER_STEP, len(names))]
        self._next_look = (self._next_look + len(some)) % len(names)
        for name in some:
            if not checks.holds(self.model, name, self._parameters[name]):
                raise RuntimeError(
                    f"{name!r} is no longer the parameter that the sparsifier was given: the module was replaced, or "
                    "weights were loaded with assign=True. Load without assign=True; after the model has changed, call "
                    "detach() and make a new Sparsifier and optimizer (its masks= takes the masks that go on)"
                )
        if any(self._parameters[name].device != self._devices[name] for name in some):
            self._move()

    def _begin(self) -> None:
        """Runs before the first step: applies the current masks to weights that were loaded since they were made."""
        self._aside = None
        self._stored.check(self._attached.optimizers)
        lost, text = self._stored.begin()
        self._warn("unknown", text)
        if lost or masking.leaks(self._weights()):
            lost += sum(count(shards.local((w != 0) & ~mask)) for mask, (w,) in self._weights())
            self._warn(
                "loaded",
                f"{lost:,} weights that the masks call inactive were not zero before the first step, and are lost: "
                "they were loaded, initialised or trained after the sparsifier was made. If a run is resumed, call "
                "sparsifier.load_state_dict(...) too, before the first step; else make the sparsifier when the "
                "weights are there",
            )
        self._clear_all()

    def _without_masked_gradients(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Returns the layers, without gradients that are zero at all inactive weights and so cannot rank them."""
        grads = {name: layer.grad for name, layer in layers.items() if name in self._masked and layer.has_grad}
        silent = [name for name, grad in grads.items() if not masking.leaks([(self._masked[name], [grad])])]
        nothing = [name for name in silent if not shards.nonzero(grads[name])]
        masked = [
            name for name in silent if name not in nothing and masking.was_masked(grads[name], self._masked[name])
        ]
        if masked:
            more = f" and {len(masked) - 1} more" if masked[1:] else ""
            self._warn(
                "masked",
                f"at step {self.step} the gradient of every inactive weight of {masked[0]!r}{more} is zero: other code "
                "has masked gradients before the step, and nothing says where to grow. The layer keeps its mask",
            )
        return dict(layers) | {name: replace(layers[name], grad=None) for name in (*nothing, *masked)}

    def _warn_if_frozen_pruned(self) -> None:
        """Warns if an update pruned a layer that has been frozen since: its other weights cannot adapt."""
        frozen = [name for name in self._trainable if not self._parameters[name].requires_grad]
        taken = [name for name in frozen if self.last_update is not None and self.last_update.dropped[name]]
        if taken:
            self._warn(
                "frozen",
                f"{taken[0]!r} is frozen (requires_grad=False) and was pruned at step {self.step}; it cannot adapt. "
                "Make the sparsifier after freezing, which leaves frozen layers dense, or name the layer in skip=",
            )

    def needs_no_more_checks(self, optimizer: Optimizer) -> bool:
        """Returns whether steps of `optimizer`, which trains sparse parameters, need no more checks.

        Warns once if it is not attached and has moved inactive weights.
        """
        attached = self._attached is not None and any(optimizer is one for one in self._attached.optimizers)
        if attached and self._attached.hooked:
            return True
        self._unattached_looks += 1
        if attached:
            return self._misses_a_call(optimizer) or self._unattached_looks > _MAX_LOOKS
        if masking.leaks(self._weights(), together=False):
            self._warn("unattached", f"{type(optimizer).__name__} {_NOT_ATTACHED}")
            return True
        return self._unattached_looks > _MAX_LOOKS

    def _check_zeros(self) -> None:
        """Warns if weights that the masks call inactive are not zero."""
        if self._detached or (self._attached is not None and self._aside is not None):  # or states are being loaded
            return
        self._look(everywhere=True)
        if "unattached" not in self._warned and masking.leaks(self._weights(), together=False):
            self._warn("unattached", "An optimizer " + _NOT_ATTACHED)

    def _warn(self, kind: str, message: str) -> None:
        """Warns once for each kind of warning; an empty message is none."""
        if message and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=4)
