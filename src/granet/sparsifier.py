"""The sparsifier: the one object that changes anything. It owns the masks, the step count and the random generator.

It acts at the optimizer step. Before it, gradients are accumulated, reduced over ranks and unscaled, so every rank sees
the same numbers; the gradient of inactive weights is set to zero there. An optimizer that treats each weight by itself
then leaves an inactive weight and its buffers at zero without more ado. Whether this one does is checked on the first
step and after every update; for an optimizer that does not (Muon mixes the weights of a matrix, L-BFGS remembers old
directions), weights and buffers are cleared after every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import distributed, masking, regrowth, state, stepping
from granet.criterion import NonFiniteScores
from granet.methods.base import Method
from granet.pattern import Pattern, parse
from granet.probe import Probe
from granet.records import LayerReport, SparsityReport, Update
from granet.reparameterize import Reparameterization, fold
from granet.selection import layers_of, refuse, select, units_of
from granet.topology import count


class Sparsifier:
    """Makes a model sparse and keeps it so while it trains.

    The weights of `model` are masked in place; its parameters, their names and its state dict stay those of the dense
    model.

    Args:
        model: the model to train. Make it sparse before the optimizer is built.
        method: what decides about the topology, `granet.GraNet(...)` for example.
        only: filters of the parameters that are sparse; see `granet.selection`.
        skip: filters of those that stay dense.
        seed: of everything random in the topology. The same seed gives the same masks on every device and rank.
        probe: a `granet.Probe`, for methods that look at gradients before training.
        masks: masks to start from, by parameter name, instead of those the method would choose.
        pattern: what every mask obeys, `"2:4"`, `"4x1"` or `"channel"`, say; see `granet.pattern`.
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
        ValueError: a filter matches nothing, no parameter is sparse, the sparsity would leave a layer empty, the
            method needs a probe, `masks` are of another model, or the pattern cannot be obeyed.

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
        only=None,
        skip=(),
        seed: int = 0,
        probe: Probe | None = None,
        masks: Mapping[str, Tensor] | None = None,
        pattern: Pattern | str | None = None,
        verify_every: int = 10,
    ):
        self.model = model
        self.pattern = parse(pattern)
        self._choices = [choice for choice in select(model, only, skip, self.pattern) if choice.sparse]
        refuse(method, self.pattern, units_of(self._choices, self.pattern))
        self._policy = self.pattern.policy(method)  # the method, as the pattern has it choose
        self._parameters = {choice.name: choice.parameter for choice in self._choices}
        self._rng = torch.Generator().manual_seed(seed)
        self.method = method
        self.step = self.version = 0
        self.last_update: Update | None = None
        self._optimizers: tuple[Optimizer, ...] = ()
        self._followers: list[nn.Module] = []
        self._hooks: list = []
        self._gradients: dict[str, Tensor] = {}  # dense, kept as the method's gradient_mix says, while it says so
        self._memory: dict[str, Tensor] = {}  # what the method remembers from update to update
        self._effective: Reparameterization | None = None  # of a method that reparameterizes, until it is folded
        self._folded = False
        self._verify_every, self._updates = verify_every, 0  # updates tried, by this object
        self._overdue = False  # an update could not be made and is tried again at the next step
        self._overflow = False  # the gradient scaler skips the step under way
        self._zeros = masking.Watch()
        self._mixed = 0  # the step whose gradients were kept last: once, however often a closure is called
        given = None if masks is None else state.checked_masks(masks, self._parameters, self.pattern, method)
        probes = () if given else state.needed(probe, method, self._parameters)
        self._set_masks(given or self._policy.init(layers_of(self._choices), self._rng, *probes))
        if method.reparameterizes:
            self._effective = Reparameterization(model, self._choices, method, self.masks)
            self._set_masks(self.masks)
        self._ever = {name: mask.clone() for name, mask in self.masks.items()}
        self._clear_all()

    def _set_masks(self, masks: Mapping[str, Tensor], memory: Mapping[str, Tensor] | None = None) -> None:
        self.masks = {name: masking.like(masks[name], p) for name, p in self._parameters.items()}
        self._active = {name: count(mask) for name, mask in self.masks.items()}
        if self._effective is not None:
            self._memory = self._effective.renew(self.masks, memory)
        # where training moves weights: all else is kept clear of gradients, and of what optimizers remember
        self.trained = self.masks if self._effective is None else self._effective.trained()
        self._masked = [name for name, mask in self.trained.items() if count(mask) < mask.numel()]

    @property
    def total(self) -> int:
        """The number of weights that take part, active or not."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def active(self) -> int:
        """The number of active weights."""
        return sum(self._active.values())

    @property
    def active_units(self) -> int:
        """The number of active weights, blocks or channels, whichever the pattern has come and go as a whole."""
        return sum(count(self.pattern.pooled_mask(mask)) for mask in self.masks.values())

    @property
    def counts(self) -> dict[str, int]:
        """The number of active weights of every sparse parameter."""
        return dict(self._active)

    @property
    def sparsity(self) -> float:
        """The share of inactive weights among the sparse parameters."""
        return 1 - self.active / self.total

    @property
    def exploration(self) -> float:
        """R_s, the share of the sparse parameters' weights that were ever active (ITOP, Liu et al. 2021)."""
        return sum(count(mask) for mask in self._ever.values()) / self.total

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
        """Tie the sparsifier to the optimizers of the model, so that the training loop stays as it is.

        Several optimizers must be stepped in the order given; together they make one step.

        Args:
            *optimizers: the optimizers. A wrapper that is no initialised `Optimizer` is unwrapped by its `.optimizer`.
            hooks: False for a loop that calls `before_step()` and `after_step()` itself, around the optimizer's step.

        Raises:
            ValueError: a sparse parameter is in none of the optimizers, or it was attached before.
            RuntimeError: the masks differ between ranks; see `verify`.
        """
        if self._optimizers:
            raise ValueError("this sparsifier is attached already: call detach() first")
        learned = {} if self._effective is None else self._effective.learned()
        self._optimizers = stepping.holders(optimizers, self._parameters | learned)
        self.load_state_dict(self.state_dict())  # the model may have moved to another device since
        if self._verify_every:
            self.verify()
        if hooks:
            self._hooks = stepping.hook(self._optimizers, self)

    def __deepcopy__(self, memo):
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__ |= deepcopy({**self.__dict__, "_hooks": []}, memo)
        if self._hooks:  # torch leaves hooks out of an optimizer's copy
            other._hooks = stepping.hook(other._optimizers, other)
        return other

    def __getstate__(self):
        raise TypeError("a Sparsifier is not pickled: save its state_dict() beside those of model and optimizer")

    def detach(self) -> None:
        """Let the optimizers go. The masks stay as they are, and nothing keeps the zeros from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], ()

    def verify(self) -> None:
        """Compare masks, step and random generator with those of all other ranks, which call this at the same time.

        Raises:
            RuntimeError: on all ranks; names the first parameter that differs, and where.
        """
        generator = distributed.checksum(self._rng.get_state())
        counters = {"step": self.step, "version": self.version, "generator": generator}
        distributed.verify(self.masks, counters, next(iter(self.masks.values())).device)

    def follow(self, module: nn.Module) -> None:
        """Keep the same-named parameters of `module`, an average of the model's weights say, sparse as well.

        `torch.optim.swa_utils.AveragedModel` and other wrappers that put the model under `module.` are understood.

        Raises:
            ValueError: `module` has not all of the sparse parameters, or not the effective weights that the model has.
        """
        self._clear_copy(module)
        self._followers.append(module)

    @torch.no_grad()
    def before_step(self) -> None:
        """Ready the gradients for the optimizer: call it when they are final, right before `optimizer.step()`.

        Gradients of inactive weights become zero. If an update follows that needs them, they are kept aside first.
        """
        if not self._optimizers:
            raise RuntimeError("attach(optimizer) comes before the first step: the optimizer's buffers must stay clean")
        self._overflow = any(stepping.found_inf(optimizer) for optimizer in self._optimizers)
        if self._overflow:
            return
        if self._mix is not None and self._mixed <= self.step:
            self._mixed = self.step + 1
            stepping.keep(self._gradients, self._parameters, *self._mix, stepping.grad_scale(self._optimizers[0]))
        if self.update_due and self.method.replaces_step and not self._overdue:
            return stepping.forget_gradients(self._optimizers)
        self.mask_gradients()
        if self.method.decays and self._effective is not None:
            self._effective.penalise(stepping.grad_scale(self._optimizers[0]))

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the step and, where the method says so, update the topology: call it right after `optimizer.step()`."""
        if self._overflow:
            self._overflow = False
            return
        due = self.update_due
        self.step += 1
        if self._masked:
            self._zeros.settle(self.step, lambda: stepping.moves(self._optimizers), self._held)
        if self.method.drifts:
            self._drift()
        if due:
            self._update()
            self._updates += 1
            if self._verify_every and self._updates % self._verify_every == 0:
                self.verify()
        following = self.method.gradient_mix(self.step + 1)
        if following is None or following[0] == 0:
            self._gradients = {}

    def _drift(self) -> None:
        """Move the active weights as the method says."""
        lr = stepping.learning_rates(self._optimizers, self._parameters)  # of a frozen parameter 0
        given = layers_of(self._choices), self.masks, self._rng, lr, self._memory
        for name, change in self.method.drift(self.step, *given).items():
            self._parameters[name].detach().add_(change.mul(self.masks[name]))

    def _layers(self):
        return layers_of(self._choices, self._gradients) if self._effective is None else self._effective.layers()

    def _update(self) -> None:
        layers = self._layers()
        try:
            if self.method.needs_grad and all(layer.grad is None for layer in layers.values()):
                raise NonFiniteScores("no sparse parameter has a gradient at this step")
            memory = (self._memory,) if self.method.remembers else ()
            masks = self._policy.update(self.step, layers, self.masks, self._rng, *memory)
        except NonFiniteScores as error:
            self._overdue, self._gradients = True, {}
            message = f"topology update at step {self.step} skipped, to be tried again at the next: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            return
        self._overdue = False
        self._apply(masks)

    def _apply(self, masks: Mapping[str, Tensor]) -> None:
        """Take over new masks: clear what they drop, in the weights, the optimizers' buffers and the followers."""
        old, before = self.masks, {name: mask.clone() for name, mask in self.trained.items()}  # some change in place
        self._set_masks(masks)
        self.last_update = Update.between(self.step, old, self.masks, self._active)
        for name in filter(self.last_update.grown.get, old):
            self._ever[name] |= self.masks[name]
        self.version += self.last_update.changed
        if self.last_update.changed or self._effective is not None:
            regrowth.warm(self._optimizers, self._parameters, before, self.trained, self._gradients)
            self._clear_all()
            self._zeros.renew()

    def _clear_all(self) -> None:
        masking.clear(self._held())
        for module in self._followers:
            self._clear_copy(module)

    def _held(self):
        """Each mask with its weight, unless that rests where it is inactive, and the optimizers' memory of it."""
        for name in self._masked:
            p = self._parameters[name]
            weights = [p.detach()] if self._effective is None else []
            yield self.trained[name], [*weights, *stepping.buffers(self._optimizers, p)]

    def _clear_copy(self, module: nn.Module) -> None:
        if self._effective is not None:
            return self._effective.put(module, self._memory)
        named = stepping.same_named(module, self.masks)
        masking.clear((masking.like(self.masks[n], named[n]), [named[n].detach()]) for n in self._masked)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of inactive weights to zero."""
        held = ((self.trained[name], self._parameters[name].grad) for name in self._masked)
        masking.clear((mask, [grad]) for mask, grad in held if grad is not None)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the live gradients of everything the optimizers hold, which are scaled to `max_norm` if above it.

        Gradients of inactive weights are left out; counted in, they would clip a sparse network several times too hard.
        They are scaled alike and stay available to an update.
        """
        if not self._optimizers:
            raise RuntimeError("attach(optimizer) comes first: it says which gradients to clip")
        masks = {self._parameters[name]: self.trained[name] for name in self._masked}
        return stepping.clip(stepping.parameters_of(self._optimizers), masks, max_norm)

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the masks off the weights as they are now, where sparsity is an outcome of training (STR)."""
        if self._effective is not None and self.method.sparsity_at(self.step) is None:
            self._apply(self.method.update(self.step, self._layers(), self.masks, self._rng))

    @torch.no_grad()
    def fold(self) -> None:
        """Turn the model, and what follows it, into a plain one: parameters become what the network computes with.

        For the end of training by a method that reparameterizes, others do so all along. The topology then stays.
        """
        if self._effective is None:
            return
        self.refresh()
        for module in (self.model, *self._followers):
            fold(module)
        self._effective, self._folded, self._memory, self._zeros = None, True, {}, masking.Watch()
        self._set_masks(self.masks)
        masking.clear(self._held())

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with its weights as the network computes with them: zero where they are inactive."""
        return dict(self.model.state_dict()) if self._effective is None else self._effective.state_dict()

    def report(self) -> SparsityReport:
        """The network as it is now: per parameter the weights, the active ones, and those that are not zero."""
        self.refresh()
        rows = tuple(LayerReport.of(name, layer, self._active[name]) for name, layer in self._layers().items())
        return SparsityReport(self.method, self.step, self.exploration, rows, str(self.pattern))

    def state_dict(self) -> dict:
        """All that a resumed run needs: tensors, numbers and strings, to be saved beside model and optimizer."""
        parts = {"masks": self.masks, "ever": self._ever, "gradients": self._gradients, "memory": self._memory}
        counters = {"step": self.step, "version": self.version, "overdue": self._overdue, "folded": self._folded}
        kind = {"method": repr(self.method), "pattern": str(self.pattern), "rng": self._rng.get_state()}
        return state.packed(parts, **kind, **counters)

    @torch.no_grad()
    def load_state_dict(self, given: Mapping) -> None:
        """Continue where `given` was taken. It is checked first and left as it is; weights are cleared to its masks.

        Raises:
            ValueError: the state is of another method or another model, or incomplete.
        """
        state.refuse_foreign(given, self.method, self.masks, self.pattern, folded=self._folded)
        self._rng.set_state(given["rng"].cpu())
        masks, self._ever, self._gradients, self._memory = state.unpacked(given, self._parameters)
        self._set_masks(masks, self._memory)
        self.step, self.version = int(given["step"]), int(given["version"])
        self._overdue, self._overflow, self._zeros = bool(given["overdue"]), False, masking.Watch()
        self._mixed = self.step
        self._clear_all()
