"""The sparsifier: the one object that changes anything. It owns the masks, the step count and the random generator.

It acts at the optimizer step. Before it, gradients are accumulated, reduced over ranks and unscaled, so every rank sees
the same numbers; the gradient of inactive weights is set to zero there. An optimizer that treats each weight by itself
then leaves an inactive weight and its buffers at zero without more ado. Whether this one does is checked on the first
steps, after every update, and for a part of the weights after every step (`granet.sparsifier.masking.Watch`); for an
optimizer that does not (Muon mixes the weights of a matrix, L-BFGS remembers old directions), weights and buffers are
cleared after every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import checks, shards, storages
from granet.criterion import NonFiniteScores
from granet.filters import Filters
from granet.methods.base import Method
from granet.pattern import Pattern, parse
from granet.probe import Probe
from granet.selection import layers_of, refuse, select, storage_reasons, units_of
from granet.sparsifier import masking, ownership, state, stepping
from granet.sparsifier.attachment import Attachment
from granet.sparsifier.ever import EverActive
from granet.sparsifier.records import LayerReport, SparsityReport, Update
from granet.sparsifier.reparameterize import Reparameterization, fold
from granet.sparsifier.upkeep import Upkeep


class Sparsifier(Upkeep):
    """Makes a model sparse and keeps it so while it trains.

    The weights of `model` are masked in place; its parameters, their names and its state dict stay those of the dense
    model (in sparse storage the state dict does). Until the first step the weights that are masked are kept aside:
    `load_state_dict` gives them back where its masks are other ones, so that model, optimizer and sparsifier of a run
    are loaded in any order before that step. In sparse storage they are not, and must come with the model's state.

    Args:
        model: the model to train. Make it sparse before the optimizer is built.
        method: what decides about the topology, `granet.GraNet(...)` for example.
        only: filters of the parameters that are sparse; see `granet.selection`.
        skip: filters of those that stay dense.
        seed: of everything random in the topology. The same seed gives the same masks on every device and rank.
        probe: a `granet.Probe`, for methods that look at gradients before training; the first rank looks, for all.
        masks: masks to start from, by parameter name, instead of those the method would choose.
        pattern: what every mask obeys, `"2:4"`, `"4x1"` or `"channel"`, say; see `granet.pattern`.
        storage: "dense", or "sparse": linear and convolution layers hold their active weights alone, as a parameter
            `values`, and so do gradients and optimizers; see `granet.sparsifier.sparse_storage`.
        verify_every: updates between two comparisons of the masks of all ranks; see `verify`. 0 for none.

    Attributes:
        model: the model given.
        pattern: what every mask obeys.
        masks: parameter name to bool tensor, True = active. Not to be changed by hand.
        trained: where gradients count, the masks for most methods; empty where that is the method's own affair (STR).
        step: optimizer steps taken, those that a gradient scaler skipped not counted.
        version: how often the masks have changed.
        last_update: what the latest update did, or None.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a filter matches nothing, no parameter is sparse, the sparsity would leave a layer empty, the
            method needs a probe, `masks` are of another model, the pattern cannot be obeyed, or another sparsifier is
            attached to weights of the model.

    >>> import granet, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
    >>> sparsifier = Sparsifier(model, granet.RigL(sparsity=0.9, end=75, interval=10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> sparsifier.attach(optimizer)
    >>> for _ in range(20):
    ...     model(torch.randn(8, 20)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> sparsifier.step, sparsifier.version, sparsifier.active, sparsifier.total
    (20, 2, 110, 1100)
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        only: Filters = None,
        skip: Filters = (),
        seed: int = 0,
        probe: Probe | None = None,
        masks: Mapping[str, Tensor] | None = None,
        pattern: Pattern | str | None = None,
        storage: str = "dense",
        verify_every: int = 10,
    ):
        checks.require_kinds(model, method, seed=seed, verify_every=verify_every)
        pattern = parse(pattern)
        self._choices = [choice for choice in select(model, only, skip, pattern) if choice.sparse]
        refuse(method, pattern, units_of(self._choices, pattern))
        storages.refuse(storage, method, storage_reasons(model, self._choices))
        super().__init__(model, pattern, {choice.name: choice.parameter for choice in self._choices})
        self._policy = pattern.policy(method)  # the method, as the pattern has it choose
        self._rng = torch.Generator("cpu").manual_seed(seed)
        self._method = method
        self.step = self.version = 0
        self.last_update: Update | None = None
        self._folded = False
        self._verify_every, self._updates = verify_every, 0  # updates tried, by this object
        self._overdue = False  # an update could not be made and is tried again at the next step
        self._overflow = False  # the gradient scaler skips the step under way
        ownership.claim(self, self._parameters.values())
        own = None if masks is None else state.checked_masks(masks, self._parameters, self.pattern, method)
        probes = () if own else state.probe_argument(probe, method, self._parameters)
        self._set_masks(
            own or state.initial_masks(self._policy, layers_of(self._choices), self._rng, probes, verify_every > 0)
        )
        if storage == "sparse":
            self._store()
        if method.reparameterizes:
            self._effective = Reparameterization(model, self._choices, method, self.masks)
            self._set_masks(self.masks)
        self._ever = EverActive(self.masks)
        self._clear_all()

    @property
    def update_due(self) -> bool:
        """Whether the topology is updated after the coming optimizer step."""
        return not self._folded and (self._overdue or self.method.is_update(self.step + 1))

    @property
    def dense_grad_due(self) -> bool:
        """Whether the coming step needs the gradient of inactive weights as well."""
        return self.method.needs_dense_grad and self._mix is not None

    @property
    def _mix(self) -> tuple[float, float] | None:
        mix = self.method.gradient_mix(self.step + 1)
        late = mix is None and self._overdue and self.method.needs_grad
        return (0.0, 1.0) if late else mix

    def attach(self, *optimizers: Optimizer, hooks: bool = True) -> None:
        """Connect the sparsifier to the optimizers of the model, so that the training loop stays as it is.

        Several optimizers are stepped in any order; a step is complete, and counted, when each has stepped at least
        once. Nothing is cleared before the first step: a run's states may be loaded before or after this.

        Args:
            *optimizers: the optimizers. Those inside of them (SAM's, ZeroRedundancyOptimizer's) are found.
            hooks: False for a loop that calls `before_step()` and `after_step()` itself, around the optimizer's step.

        Raises:
            TypeError: an argument is not an optimizer and contains none.
            ValueError: a sparse parameter is in none of the optimizers, it was attached before, or another sparsifier
                is attached to weights of the model.
            RuntimeError: the masks differ between ranks; see `verify`.
        """
        if self._attached is not None:
            raise ValueError("this sparsifier is attached already: call detach() first")
        learned = {} if self._effective is None else self._effective.learned()
        attached = Attachment(optimizers, self._parameters, learned)
        self._stored.refuse(attached.optimizers)
        ownership.claim(self, self._parameters.values())
        self._attached, self._detached, self._overflow = attached, False, False
        self._no_calls()
        self._move()  # the model may have moved to another device since
        self._aside = self._aside or state.Aside()
        if self._verify_every:
            self.verify()
        if hooks:
            attached.hook(self)

    def __deepcopy__(self, memo):
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__ |= deepcopy(self.__dict__, memo)
        other._stored.listen(other)
        if not other._detached:
            ownership.claim(other, other._parameters.values())
        if self._attached is not None and self._attached.hooked:  # torch leaves hooks out of an optimizer's copy
            other._attached.hook(other)
        return other

    def __getstate__(self):
        raise TypeError("a Sparsifier is not pickled: save its state_dict() beside those of model and optimizer")

    def __repr__(self) -> str:
        tied = "attached" if self.attached else "not attached"
        return (
            f"Sparsifier({self.method!r}: {self.active:,} of {self.total:,} weights active in {len(self.masks)} "
            f"parameters, step {self.step:,}, {tied})"
        )

    def detach(self) -> None:
        """Disconnect from the optimizers. The masks stay as they are, but nothing keeps inactive weights at zero."""
        if self._attached is not None:
            self._attached.release()
        self._attached, self._detached = None, True
        ownership.release(self, self._parameters.values())

    def verify(self) -> None:
        """Compare masks, step and random generator with those of all other ranks, which call this at the same time.

        Raises:
            RuntimeError: on all ranks; names the first parameter that differs, and where.
        """
        generator = shards.checksum(self._rng.get_state())
        counters = {"step": self.step, "version": self.version, "generator": generator}
        shards.verify(self.masks, counters, next(iter(self.masks.values())).device)

    def before_step(self) -> None:
        """Prepare the gradients for the optimizers: call it when they are final, right before `optimizer.step()`.

        Gradients of inactive weights become zero. If an update follows that needs them, they are kept aside first.

        Raises:
            RuntimeError: the sparsifier is not attached, or it is attached with hooks that do this already.
        """
        self._called_by_hand("before_step")
        self._overflow = any(stepping.found_inf(optimizer) for optimizer in self._attached.optimizers)
        if not self._overflow:
            self._ready(*self._attached.optimizers)

    def after_step(self) -> None:
        """Count the step and, where the method says so, update the topology: call it right after `optimizer.step()`.

        Raises:
            RuntimeError: `before_step()` was not called, or the sparsifier is attached with hooks that do this already.
        """
        self._called_by_hand("after_step")
        if self._overflow or self._attached is None:
            self._overflow = False
            return
        for optimizer in self._attached.optimizers:
            self._settle(optimizer)
        self._attached.begin()
        self._count()

    @torch.no_grad()
    def _ready(self, *optimizers: Optimizer, final: bool = True) -> None:
        """Prepare the gradients of what these optimizers hold: keep a copy of what an update needs, then mask them.

        Args:
            *optimizers: those that step now.
            final: False inside the step of another optimizer, which has prepared these gradients already.
        """
        if any(stepping.found_inf(optimizer) for optimizer in optimizers):
            return
        self._look(everywhere=self._aside is not None)
        if self._aside is not None:
            self._begin()
        names = [name for optimizer in optimizers for name in self._attached.names(optimizer)]
        scale = stepping.grad_scale(optimizers[0])
        if self._mix is not None:
            again = final and self._mix[0] == 0  # the latest one counts, and a mixture is made once
            new = names if again else [name for name in names if name not in self._taken]
            new = [name for name in new if not (self.method.needs_dense_grad and name in self._stored)]  # it has them
            stepping.keep(self._gradients, {name: self._parameters[name] for name in new}, *self._mix, scale)
            self._taken.update(new)
        replaced = self.update_due and self.method.replaces_step and not self._overdue
        if replaced and not any(map(self._attached.has_stepped, optimizers)):
            return stepping.forget_gradients(optimizers)
        self._mask(names)
        if final and self.method.decays and self._effective is not None:
            self._effective.penalise(scale, names)

    @torch.no_grad()
    def _stepped(self, optimizer: Optimizer) -> None:
        """Runs after a step of one of the optimizers."""
        self._settle(optimizer)
        if self._attached.record_step(optimizer):
            self._count()

    @torch.no_grad()
    def _count(self) -> None:
        """Runs after a complete step: counts it, and updates the topology where an update is due."""
        due = self.update_due
        self.step += 1
        self._taken = set()
        self._stored.check(self._attached.optimizers)
        if self.method.drifts:
            self._drift(layers_of(self._choices), self._rng)
        if due:
            self._look(everywhere=True)
            self._update()
            self._updates += 1
            if self._verify_every and self._updates % self._verify_every == 0:
                self.verify()
        following = self.method.gradient_mix(self.step + 1)
        if following is None or following[0] == 0:
            self._gradients = {}
        self._stored.begin_step()

    def _layers(self):
        if self._effective is not None:
            return self._effective.layers()
        return layers_of(self._choices, self._gradients) | self._stored.layers(self._gradients)

    def _update(self) -> None:
        self._combine_gradients()
        layers = self._without_masked_gradients(self._layers()) if self.method.needs_dense_grad else self._layers()
        try:
            if self.method.needs_grad and not any(layer.has_grad for layer in layers.values()):
                raise NonFiniteScores("no sparse parameter has a gradient at this step")
            memory = (self._memory,) if self.method.remembers else ()
            masks = self._policy.update(self.step, layers, self.masks, self._rng, *memory)
        except NonFiniteScores as error:
            if not self._overdue:  # otherwise there was a warning already
                text = f"topology update at step {self.step} skipped, to be tried again at each of the next: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
            self._overdue, self._gradients = True, {}
            return
        self._overdue = False
        self._apply(masks)
        self._warn_if_frozen_pruned()

    def _apply(self, masks: Mapping[str, Tensor]) -> None:
        """Take over new masks: clear what they drop, in the weights, the optimizers' buffers and the followers."""
        own = self._effective is not None  # sets that change in place
        old, before = self.masks, {n: m.clone() for n, m in self.trained.items()} if own else self.trained
        self._set_masks(masks)
        self.last_update = Update.between(self.step, old, self.masks, self._active)
        self._ever.add({name: self.masks[name] for name, grown in self.last_update.grown.items() if grown})
        self.version += self.last_update.changed
        if self.last_update.changed or self._effective is not None:
            self._carry(old, before)
            self._clear_all()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the masks off the weights as they are now, where sparsity is an outcome of training (STR)."""
        if self._effective is not None and self.method.sparsity_at(self.step) is None:
            self._apply(self.method.update(self.step, self._layers(), self.masks, self._rng))

    @torch.no_grad()
    def fold(self) -> None:
        """Turn the model, and what follows it, into a plain one: parameters become what the network computes with.

        For the end of training by a method that reparameterizes, or in sparse storage; the topology then stays. Of
        sparse storage the dense weights are made again, and optimizers that were made before no longer train them.
        """
        if self._stored:
            self._unstore()
        if self._effective is None:
            return
        self.refresh()
        for module in (self.model, *self._followers):
            fold(module)
        self._effective, self._folded, self._memory = None, True, {}
        if self._attached is not None:
            self._attached.reset()
        self._set_masks(self.masks)
        masking.clear(self._held())

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with its weights as the network computes with them: zero where they are inactive."""
        return dict(self.model.state_dict()) if self._effective is None else self._effective.state_dict()

    def report(self) -> SparsityReport:
        """The network as it is now: per parameter the weights, the active ones, and those that are not zero."""
        self._check_zeros()
        self.refresh()
        rows = tuple(LayerReport.from_layer(name, layer, self._active[name]) for name, layer in self._layers().items())
        return SparsityReport(self.method, self.step, self.exploration, rows, str(self.pattern))

    def state_dict(self) -> dict:
        """All that a resumed run needs: tensors, numbers and strings, to be saved beside model and optimizer."""
        self._check_zeros()
        parts = {"masks": self.masks, "ever": self._ever.masks(), "gradients": self._gradients, "memory": self._memory}
        counters = {"step": self.step, "version": self.version, "overdue": self._overdue, "folded": self._folded}
        kind = {"method": repr(self.method), "pattern": str(self.pattern), "rng": self._rng.get_state()}
        return state.packed(parts, **kind, **counters)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping) -> None:
        """Continue from a saved state. It is checked first and not changed; weights outside its masks become zero.

        Raises:
            ValueError: the state is of another method or another model, or incomplete.
        """
        saved = state.renamed(state_dict, self._parameters)
        state.refuse_foreign(saved, self.method, self.masks, self.pattern, folded=self._folded)
        if self._aside is not None:
            self._aside.give_back(self._parameters)
        self._restore(saved)
        self._stored.reposition(self.masks, self._followers)
        self._compact()
        self._aside = state.Aside()
        self._clear_all()

    def _restore(self, saved: Mapping) -> None:
        """Take over a saved state, on the devices of the parameters."""
        self._rng.set_state(saved["rng"].cpu())
        masks, self._ever, self._gradients, self._memory = state.unpacked(saved, self._parameters)
        self._set_masks(masks, self._memory)
        self.step, self.version = int(saved["step"]), int(saved["version"])
        self._overdue, self._overflow, self._taken = bool(saved["overdue"]), False, set()
        if self._attached is not None:
            self._attached.reset()
