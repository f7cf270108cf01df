"""Sparse compute for training: forward and backward of the layers it pays for run on the sparse kernels.

Parameters stay the dense tensors they are; only the modules' `forward` is exchanged, and given back by `remove()`.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from granet import native
from granet.engine import eager, ops, timing
from granet.engine.graph import arguments_of
from granet.engine.layer import Forward, autocast_words, dtype_name, is_exchanged
from granet.engine.report import DENSE, OTHER_FORMAT, SPARSE, LayerReport, TrainingReport
from granet.engine.timing import Spread, Timings, wall_times
from granet.names import described
from granet.ranks import Ranks, current
from granet.sparsifier.core import Sparsifier
from granet.sparsifier.reparameterize import is_reparameterized
from granet.sparsifier.sparse_storage.weight import shape_of as stored_shape

log = logging.getLogger(__name__)


class TrainingPlan:
    """The layers of a model that run sparse while it trains. See `accelerate`."""

    def __init__(self, sparsifier: Sparsifier, model: nn.Module, inputs: Tensor | Sequence | Mapping):
        self.sparsifier, self.model, self.inputs = sparsifier, model, arguments_of(inputs)
        self.enabled = True  # False while the model is timed without the sparse kernels
        self.rows: list[Forward | LayerReport] = []  # of all modules that have parameters, in the model's order
        self.whole: dict[str, Spread] = {}  # forward and backward of the whole model, as last measured
        self.autocast = eager.autocast_dtype()  # the type of autocast that the plan is made for
        self.why = ""
        self._confirmed = False  # the whole model has been measured to be faster
        self._version = sparsifier.version
        self._warned = False  # whether a step under another autocast than the plan's was reported
        self._due = False  # whether layers are to be measured for a topology that has changed
        # one choice for all ranks that train one network, by the first one's clock
        self._ranks = current() if sparsifier._verify_every else Ranks()
        self.timings = Timings(self._ranks)
        self._attached = None  # the sparsifier's optimizers that tell this plan of their steps
        self._hooks: list = []

    @property
    def forwards(self) -> list[Forward]:
        """The layers that the kernels can compute."""
        return [row for row in self.rows if isinstance(row, Forward)]

    def report(self) -> TrainingReport:
        """What was measured for every layer, and what was chosen."""
        rows = tuple(row.row if isinstance(row, Forward) else row for row in self.rows)
        return TrainingReport(rows, self.why, dict(self.whole), self.setting)

    @property
    def setting(self) -> str:
        """The precision and memory format of the loop that the plan is made for, as its inputs show them."""
        precision = f"{dtype_name(self.autocast)} autocast" if self.autocast else "float32"
        last = _memory_format(self.inputs) is torch.channels_last
        return f"{precision}, {'channels_last' if last else 'contiguous'}"

    def follow(self) -> bool:
        """Takes note of a topology that has changed, and returns whether the sparse kernels may run.

        Each layer calls this before it runs.
        """
        if not self.enabled:
            return False
        if eager.autocast_dtype() is not self.autocast:
            self._warn_of_autocast()
            return False
        if self._attached is not self.sparsifier._attached:
            self._listen()
        if self._version != self.sparsifier.version:
            self._version, self._due = self.sparsifier.version, True
            for forward in self.forwards:
                forward.forget()
        if self._due and torch.is_grad_enabled():  # one rank alone may evaluate the model, all of them train it
            self._due = False
            self._measure([f for f in self.forwards if f.worth_measuring])
        return True

    def _warn_of_autocast(self) -> None:
        if torch.is_grad_enabled() and not self._warned:
            self._warned = True
            log.warning(
                "the model trains %s, and its plan was made %s: all layers run dense. Call granet.accelerate inside of "
                "the same torch.autocast as the training step",
                autocast_words(eager.autocast_dtype()),
                autocast_words(self.autocast),
            )

    def _listen(self) -> None:
        """Has the sparsifier's optimizers tell of their steps, after which it has cleared what is inactive."""
        for hook in self._hooks:
            hook.remove()
        attached = self._attached = self.sparsifier._attached
        # where the loop calls before_step() and after_step() itself, the weights are looked at in each step instead
        listened = attached.optimizers if attached is not None and attached.hooked else ()
        self._hooks = [optimizer.register_step_post_hook(self._stepped) for optimizer in listened]

    def _stepped(self, *_: object) -> None:
        for forward in self.forwards:
            forward.settled()

    def replan(self) -> None:
        """Measures every layer again, at the density it has now and under the autocast of now, and the whole model."""
        self.autocast, self._warned = eager.autocast_dtype(), False
        self.record()
        self._version, self._due, self._confirmed = self.sparsifier.version, False, False
        self.timings.clear()
        for forward in self.forwards:
            forward.forget()
        self._measure(self.forwards)

    def _measure(self, forwards: list[Forward]) -> None:
        for forward in forwards:
            forward.measure()
        chosen = [f for f in self.forwards if f.runs_sparse]
        if not chosen:
            self.why = "Nothing wins: the model runs as without the engine."
        elif not self._confirmed:
            self._judge(chosen)

    def _judge(self, chosen: list[Forward]) -> None:
        """Keeps the choice if the whole model's forward and backward are faster with it, else takes all of it back.

        Faster means by the shortest time and by the median: see `Spread.is_faster_than`.
        """
        saved = sum(f.row.dense_ms - f.row.sparse_ms for f in chosen)
        if self.whole and saved < timing.NOISE * self.whole[DENSE].least:
            whole = self.whole[DENSE].least
            self.why = f"The layers' gain of {saved:.2f} ms is within the noise of the whole, {whole:.2f} ms."
        else:
            self.whole = self._ranks.decide(lambda: wall_times(self.candidates()))
            fast, dense = (
                self.whole[SPARSE],
                min((v for n, v in self.whole.items() if n != SPARSE), key=operator.attrgetter("least")),
            )
            self._confirmed = all(fast.is_faster_than(one) for name, one in self.whole.items() if name != SPARSE)
            self.why = (
                f"The whole model's forward + backward, {dense.runs} times each in turns after a warm-up: "
                + ", ".join(f"{self._named(name)} {spread}" for name, spread in self.whole.items())
                + f"; {dense.least / fast.least:.2f}x by the shortest and "
                + f"{dense.median / fast.median:.2f}x by the median"
            )
            if self._confirmed:
                self.why += "."
            elif fast.is_faster_than(self.whole[DENSE]):
                other = "contiguous_format" if _memory_format(self.inputs) is torch.channels_last else "channels_last"
                self.why += (
                    ": all layers run dense. The dense model is faster in the other memory format: convert the model "
                    f"and its inputs by .to(memory_format=torch.{other})."
                )
            else:
                self.why += ": nothing wins, all layers run dense."
        if not self._confirmed:
            log.info("%s", self.why)
            for forward in chosen:
                forward.run_dense("faster alone, but not in the whole model")

    def _named(self, variant: str) -> str:
        if variant != OTHER_FORMAT:
            return f"{variant} ({self.setting})"
        last = _memory_format(self.inputs) is torch.channels_last
        return f"dense (float32, {'contiguous' if last else 'channels_last'})"

    def candidates(self) -> dict[str, Callable[[], None]]:
        """Returns the variants of the whole model that are timed; each call is one forward and backward."""
        variants = {
            DENSE: functools.partial(self._step, enabled=False),
            SPARSE: functools.partial(self._step, enabled=True),
        }
        images = any(isinstance(t, Tensor) and t.dim() == 4 for t in tree_leaves(self.inputs))
        if self.autocast is None and images:  # under autocast the user's own loop is the baseline
            last = _memory_format(self.inputs) is torch.channels_last
            wanted = torch.contiguous_format if last else torch.channels_last
            inputs = tree_map(lambda leaf: _in_format(leaf, wanted), self.inputs)
            weights = {
                name: _in_format(p.detach(), wanted).requires_grad_(p.requires_grad)
                for name, p in self.model.named_parameters()
            }
            variants[OTHER_FORMAT] = functools.partial(self._step, enabled=False, weights=weights, inputs=inputs)
        return variants

    def _step(self, *, enabled: bool, weights: dict[str, Tensor] | None = None, inputs: tuple | None = None) -> None:
        """Runs one forward and backward of the model; no gradient, buffer or random state is changed."""
        self.enabled = enabled
        parameters = self.model.parameters() if weights is None else weights.values()
        wanted = [p for p in parameters if p.requires_grad]
        try:
            with eager.apart(), _evaluating(self.model):
                with eager.autocast(self.autocast):
                    results = self._call(weights, inputs)
                outputs = [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.requires_grad]
                if outputs:
                    torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)
        finally:
            self.enabled = True

    def _call(self, weights: dict[str, Tensor] | None = None, inputs: tuple | None = None) -> object:
        positional, named = inputs or self.inputs
        if weights is None:
            return self.model(*positional, **named)
        return functional_call(self.model, weights, tuple(positional), dict(named))

    def record(self) -> None:
        """Notes the form of each layer's input, by running the model once without the kernels."""

        def note(forward: Forward) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = args[0] if args else kwargs["input"]
                forward.sample = torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)
                forward.autocast = self.autocast

            return hook

        for forward in self.forwards:
            forward.sample = None
        self.enabled = False
        hooks = [f.module.register_forward_pre_hook(note(f), with_kwargs=True) for f in self.forwards]
        try:
            with eager.apart(), _evaluating(self.model), eager.autocast(self.autocast):
                self._call()
        finally:
            self.enabled = True
            for hook in hooks:
                hook.remove()

    def remove(self) -> None:
        """Gives every module its own forward back."""
        for forward in self.forwards:
            forward.runs_sparse = False  # for whoever has wrapped the forward meanwhile, and keeps it
            if forward.module.__dict__.get("forward") is forward:
                del forward.module.forward
        for hook in self._hooks:
            hook.remove()
        self.rows, self._hooks, self._attached, self.whole = [], [], None, {}
        self.why = "removed"


def accelerate(
    sparsifier: Sparsifier, example_inputs: Tensor | Sequence | Mapping, *, model: nn.Module | None = None
) -> TrainingPlan:
    """Returns a plan under which the sparsifier's model trains on sparse kernels where they are measured to be faster.

    Weights and their names stay as they are. The weight gradient is computed at active positions only, except in steps
    after which the method needs the dense one, and where gradients are differentiated again. Layers are measured again
    as their density falls, and the whole model's forward and backward, with and without the kernels, once the first of
    them win.

    The kernels are compared with the step that the training loop would run without them: under the autocast that is
    active in this call, and in the memory format of the example inputs; in float32 also in the other format. So call
    this inside of `torch.autocast` if the loop uses it. Where nothing wins, or the kernels are not available, nothing
    changes and the report gives the reason.

    Numbers are those of the dense model up to rounding, however it is called. The layers run dense under `torch.func`,
    `vmap`, forward-mode derivatives, dispatch modes and `functional_call`, under another autocast than the plan's, and
    where a weight was replaced or is not zero where it is inactive. They also run dense while `torch.export`,
    `torch.onnx` or `torch.jit.trace` record the model, so that exported models hold torch's own operators.
    `torch.jit.script` needs `plan.remove()` first.

    Of several ranks that train one network all call this, and the first one's measurements decide for all.

    Args:
        sparsifier: the sparsifier of the model; its topology is followed.
        example_inputs: what the model is trained with, batch size included: a tensor, several in a tuple or list, or a
            mapping of keyword arguments.
        model: the module to call with them; the sparsifier's model if None.

    Raises:
        TypeError: if something of another kind is given than is needed.
    """
    for given, kind in ((sparsifier, Sparsifier), (model, nn.Module | None)):
        if not isinstance(given, kind):
            wanted = (
                "the sparsifier of the model comes first" if kind is Sparsifier else "model= takes a torch.nn.Module"
            )
            raise TypeError(f"accelerate(...) was given {described(given)}: {wanted}")
    plan = TrainingPlan(sparsifier, sparsifier.model if model is None else model, example_inputs)
    refused = ""
    if is_reparameterized(sparsifier.model):
        name = type(sparsifier.method).__name__
        refused = f"{name} trains other weights than those it computes with, which the kernels cannot."
    elif plan._ranks.any(not native.available()):
        refused = "The sparse kernels are not available on this machine, or on that of another rank."
    for name, module in sparsifier.model.named_modules():
        if any(p is not None for p in module._parameters.values()):
            plan.rows.append(_planned(plan, name, module, refused))
    if refused:
        plan.why = refused
        return plan
    ops.prepare()
    try:
        for forward in plan.forwards:
            forward.module.forward = forward
        plan.replan()
    except BaseException:
        plan.remove()
        raise
    return plan


def _planned(plan: TrainingPlan, name: str, module: nn.Module, refused: str) -> Forward | LayerReport:
    """The exchanged forward of a module, or the row of the report that says why it keeps its own."""
    masks = plan.sparsifier.masks
    own = {f"{name}.{leaf}".lstrip("."): p for leaf, p in module._parameters.items() if p is not None}
    stored = stored_shape(module)
    sparse = [masks[key] for key in ([f"{name}.weight".lstrip(".")] if stored else own) if key in masks]
    parameters = dict(plan.sparsifier.model.named_parameters())
    shared = [key for key in masks if key not in own and any(parameters.get(key) is p for p in own.values())]
    if shared:
        why = f"it shares its weight with {shared[0]!r}"
    elif stored and isinstance(module, nn.Linear):
        why = "in sparse storage, where linear layers have kernels of their own"
    elif not sparse:
        why = f"{type(module).__name__} has no sparse weight"
    elif refused:
        why = refused
    elif isinstance(module.__dict__.get("forward"), Forward):
        why = "accelerated by another plan: call remove() of that one first"
    elif is_exchanged(module):
        why = "its forward was exchanged by somebody else"
    else:
        try:
            return Forward(module, name, plan.sparsifier, plan.timings, plan.follow)
        except ValueError as error:
            why = str(error)
    total = sum(mask.numel() for mask in sparse)
    density = sum(mask.count_nonzero().item() for mask in sparse) / total if total else 1.0
    shape = stored or max((tuple(p.shape) for p in own.values()), key=lambda s: (len(s), s))
    return LayerReport(name, shape, density, None, None, DENSE, why)


def _memory_format(inputs: object) -> torch.memory_format:
    """Returns the format of the first image tensor among the inputs; contiguous where there is none."""
    images = (t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() == 4)
    return suggest_memory_format(image) if (image := next(images, None)) is not None else torch.contiguous_format


def _in_format(leaf: object, wanted: torch.memory_format) -> object:
    if not isinstance(leaf, Tensor) or leaf.dim() != 4:
        return leaf
    return leaf.detach().clone(memory_format=wanted).requires_grad_(leaf.requires_grad)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's mode and buffers are put back, if its forward changes them."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [(m._buffers, key, b, b.clone()) for m in modules for key, b in m._buffers.items() if b is not None]
    try:
        model.eval()
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for held, key, buffer, value in buffers:
            held[key] = buffer
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
