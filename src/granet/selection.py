"""Selection: which parameters of a model are sparse, and why; the plan that shows it before training.

By default the weights of linear, convolution, recurrent and attention layers are sparse; biases, norms, embeddings and
parameters that a module defines for itself stay dense, and so does what is frozen while other parameters are trained:
its other weights could not adapt. `only` and `skip` are filters, or lists of them:

- `"linear"`, `"conv"`, `"attention"`, `"recurrent"`, `"embedding"`, `"norm"`: the weights of modules of that kind;
- a parameter's or a module's exact name, `"head.weight"` or `"head"`;
- a pattern with wildcards, `"layer1.*"`, which matches parameters that are sparse by default. If it matches none of
  them, it matches the matrices that modules define for themselves (`"experts.*"`, a ParameterList) or that are frozen;
- a module class, `torch.nn.Conv1d`;
- a function of `(name, module, parameter)` that returns True or False.

A kind, an exact parameter name or a class in `only` also includes parameters that would stay dense by default.

With a pattern (`granet.pattern`), a sparse weight must have a shape that can obey it; `unfit` returns the filters that
leave the others dense. Under "channel" the last layer stays dense, because its outputs are the network's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from granet import shards, storages
from granet.checks import refuse_pruned, refuse_sparse_gradients, require_kinds
from granet.criterion import Layer
from granet.filters import KINDS, Default, Filter, Filters, by_default, hits, listed
from granet.methods.base import Method
from granet.names import nearest
from granet.pattern import Pattern, parse
from granet.text import columns


@dataclass(frozen=True)
class Choice:
    """The decision whether one parameter is sparse.

    Attributes:
        name: the name in `model.named_parameters()`.
        aliases: the other names of the same parameter, if it is tied or its module is shared.
        parameter: the parameter itself.
        sparse: whether it is sparse.
        reason: the reason for the decision, in a few words.
    """

    name: str
    aliases: tuple[str, ...]
    parameter: nn.Parameter
    sparse: bool
    reason: str


def select(
    model: nn.Module,
    only: Filters = None,
    skip: Filters = (),
    pattern: Pattern | str | None = None,
) -> list[Choice]:
    """Returns a choice for every parameter of `model`, in the order of `named_parameters()`; a tied one appears once.

    Raises:
        TypeError: `only` or `skip` is not a filter.
        ValueError: a filter matches nothing, a parameter has no shape yet, no parameter is sparse at all, or a sparse
            parameter cannot obey the pattern, has sparse gradients, or belongs to a weight that torch's pruning masks.
    """
    wanted, unwanted = listed("only", only), listed("skip", skip)
    owned = owners(model)
    used: set[int] = set()
    training = any(entries[0][2].requires_grad for entries in owned.values())
    defaults = {key: by_default(entries, training) for key, entries in owned.items()}
    wide = {  # patterns that match nothing that is sparse by default
        id(one)
        for one in (*wanted, *unwanted)
        if isinstance(one, str) and not any(hits([one], owned[key], defaults[key], {}, set()) for key in owned)
    }
    choices = [
        _choose(entries, defaults[key], wanted if only is not None else None, unwanted, wide, used)
        for key, entries in owned.items()
    ]
    for kind, filters in (("only", wanted), ("skip", unwanted)):
        for one in filters:
            if id(one) not in used:
                known = [name for names in owned.values() for name, *_ in names]
                near = nearest(one, [*known, *KINDS], 3)
                hint = f"; the nearest names are: {', '.join(near)}" if near else f"; the kinds are: {', '.join(KINDS)}"
                raise ValueError(f"{kind}={one!r} matches no parameter of the model{hint}")
    choices = _obeying(choices, parse(pattern))
    if not any(choice.sparse for choice in choices):
        reasons = dict.fromkeys(choice.reason for choice in choices if choice.parameter.ndim > 1)
        because = f": {'; '.join(list(reasons)[:4])}" if reasons else ": the model has no matrices"
        raise ValueError(f"no parameter of {type(model).__name__} is sparse with only={only!r}, skip={skip!r}{because}")
    return choices


def _obeying(choices: list[Choice], pattern: Pattern) -> list[Choice]:
    """Returns the choices after the pattern is applied: if it spares the last layer, that layer is dense.

    Raises:
        ValueError: a sparse weight cannot obey the pattern.
    """
    last = [choice for choice in choices if choice.sparse][-1:] if pattern.spares_last else []
    if last and last[0].reason != f"only={last[0].name!r}":
        reason = f"the last layer's {pattern.unit} are the network's outputs; name it in only= to prune them"
        choices = [replace(choice, sparse=False, reason=reason) if choice is last[0] else choice for choice in choices]
    for choice in choices:
        if choice.sparse and str(pattern) != "unstructured" and shards.is_sharded(choice.parameter):
            raise ValueError(
                f"{choice.name!r} is sharded, and sharded parameters allow only the pattern 'unstructured', "
                f"not {pattern}: leave it dense with skip={choice.name!r}, or choose that pattern"
            )
        why = pattern.misfit(tuple(choice.parameter.shape)) if choice.sparse else None
        if why:
            raise ValueError(
                f"{choice.name!r} of shape {tuple(choice.parameter.shape)} cannot obey pattern {pattern}: {why}. "
                f"Leave it dense with skip={choice.name!r}, or choose another pattern"
            )
    return choices


@dataclass(frozen=True)
class _Unfit:
    """The filter that matches the weights whose shapes cannot obey a pattern."""

    pattern: Pattern
    names: tuple[str, ...]

    def __call__(self, name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        return f"<shapes that {self.pattern} does not fit>"


def unfit(
    model: nn.Module,
    pattern: Pattern | str | None,
    only: Filters = None,
    skip: Filters = (),
) -> tuple[Filter, ...]:
    """Returns filters for `skip` that leave dense the weights that cannot obey `pattern`; none if all can obey it.

    >>> model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    >>> [choice.sparse for choice in select(model, skip=unfit(model, "2:4"), pattern="2:4")]
    [False, False, True, False]
    """
    pattern = parse(pattern)
    sparse = [choice for choice in select(model, only, skip) if choice.sparse]
    names = tuple(choice.name for choice in sparse if pattern.misfit(tuple(choice.parameter.shape)))
    return (_Unfit(pattern, names),) if names else ()


def owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, nn.Parameter]]]:
    """Returns, by the id of each parameter, all its names, each with the module that holds it under that name."""
    owned: dict[int, list[tuple[str, nn.Module, nn.Parameter]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{leaf}" if path else leaf
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name} has no shape yet: run the model on an input once before you make it sparse")
            owned.setdefault(id(parameter), []).append((name, module, parameter))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {key: sorted(owned[key], key=lambda entry, key=key: entry[0] != first[key]) for key in first}


def _choose(names, default: Default, wanted, unwanted, wide, used) -> Choice:
    """Returns the choice for one parameter, given all its names, its default, and the filters of `only` and `skip`."""
    name, module, parameter = names[0]
    aliases = tuple(dict.fromkeys(alias for alias, *_ in names[1:] if alias != name))

    def say(sparse: bool, reason: str) -> Choice:
        if sparse:
            refuse_sparse_gradients(name, module)
            refuse_pruned(name, module)
        return Choice(name, aliases, parameter, sparse, reason)

    left_out = hits(unwanted, names, default, wide, used)
    asked_for = hits(wanted or [], names, default, wide, used)
    if not parameter.is_floating_point():
        return say(False, f"{parameter.dtype} is not a real floating-point type")
    if not parameter.numel():
        return say(False, "it is empty")
    if left_out:
        return say(False, f"skip={left_out[0]!r}")
    if wanted is None:
        refuse_pruned(name, module)  # also if it is dense by default, because then another weight becomes sparse
        return say(default.sparse, default.reason)
    frozen = ", frozen" if default.reason.startswith("frozen") else ""
    return say(True, f"only={asked_for[0]!r}{frozen}") if asked_for else say(False, "not in only=")


@dataclass(frozen=True)
class PlanRow:
    """One parameter in the plan.

    Attributes:
        name: the name in `model.named_parameters()`.
        shape: the shape of the weight.
        sparse: whether it is sparse.
        reason: the reason for that, in a few words.
        initial: the budget before training, in units of the pattern: weights, blocks or channels.
        final: the budget after training. Both budgets are None if layers compete for them or the network decides.
        units: the number of units, active or not.
    """

    name: str
    shape: tuple[int, ...]
    sparse: bool
    reason: str
    initial: int | None
    final: int | None
    units: int


@dataclass(frozen=True)
class Plan:
    """What a method will do to a model. `str(plan)` is a table, `plan.rows` the data behind it.

    Budgets are in units of the pattern: weights, blocks or channels. In the table, "global" means that layers compete
    for a common budget, and "found" that no budget is set: the number is what the network has, or gets by training.
    """

    method: Method
    rows: tuple[PlanRow, ...]
    initial_active: int | None  # None if the network decides
    final_active: int | None
    pattern: Pattern

    @property
    def sparse_total(self) -> int:
        """The number of weights in sparse parameters, active or not."""
        return sum(prod(row.shape) for row in self.rows if row.sparse)

    @property
    def sparse_units(self) -> int:
        """The number of units in sparse parameters, active or not."""
        return sum(row.units for row in self.rows if row.sparse)

    def __str__(self) -> str:
        pooled = self.pattern.pools
        body = []
        for row in self.rows:
            shape, size, units = "x".join(map(str, row.shape)), f"{prod(row.shape):,}", f"{row.units:,}"
            budgets = [self._budget(row, row.initial, self.initial_active)]
            budgets += [self._budget(row, row.final, self.final_active)]
            body.append([row.name, shape, size, units if row.sparse else "", *budgets, row.reason])
        units = self.sparse_units
        budgets = ["found" if n is None else _share(n, units) for n in (self.initial_active, self.final_active)]
        body.append(["sparse parameters", "", f"{self.sparse_total:,}", f"{units:,}", *budgets, ""])
        dense = sum(prod(row.shape) for row in self.rows if not row.sparse)
        body.append(["dense parameters", "", f"{dense:,}", "", "dense", "dense", ""])
        rows = [["parameter", "shape", "weights", self.pattern.unit, "initial", "final", "why"], *body]
        if pooled:
            return f"{self.method!r}, pattern {self.pattern}\n\n{columns(rows, right=(2, 3, 4, 5))}"
        table = columns([[*row[:3], *row[4:]] for row in rows], right=(2, 3, 4))
        return f"{self.method!r}" + f", pattern {self.pattern}" * bool(self.pattern.order) + f"\n\n{table}"

    @staticmethod
    def _budget(row: PlanRow, count: int | None, total: int | None) -> str:
        """Returns the text of one budget of a row; `total` is that of all layers together."""
        if row.sparse and count is None:
            return "found" if total is None else "global"
        return _share(count, row.units)


def plan(
    model: nn.Module,
    method: Method,
    *,
    only: Filters = None,
    skip: Filters = (),
    pattern: Pattern | str | None = None,
    storage: str = "dense",
) -> Plan:
    """Returns the plan of `method` for `model`: every parameter, whether it is sparse and why, its shape and budgets.

    Args:
        model: the model; nothing in it changes.
        method: the method with its hyper-parameters.
        only: filters that match the sparse parameters; see `granet.selection`.
        skip: filters that match parameters to leave dense.
        pattern: the pattern that every mask obeys; see `granet.pattern`.
        storage: that of the weights; with "sparse" the reasons say which layers are in dense storage all the same.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as for `select`; or the sparsity leaves a layer without any weight, or the method cannot obey the
            pattern, or cannot train in that storage.

    >>> import granet, torch
    >>> print(granet.plan(torch.nn.Sequential(torch.nn.Linear(8, 4)), granet.Static(sparsity=0.75)))
    Static(sparsity=0.75, distribution='erk')
    <BLANKLINE>
    parameter          shape  weights   initial     final  why
    ----------------------------------------------------------------------------------
    0.weight           4x8         32  8  25.0%  8  25.0%  linear
    0.bias             4            4     dense     dense  bias, scale or other vector
    sparse parameters              32  8  25.0%  8  25.0%
    dense parameters                4     dense     dense
    """
    require_kinds(model, method)
    pattern = parse(pattern)
    choices = select(model, only, skip, pattern)
    shapes = units_of(choices, pattern)
    refuse(method, pattern, shapes)
    reasons = storage_reasons(model, choices)
    storages.refuse(storage, method, reasons)
    notes = {name: f"; in dense storage: {why}" for name, why in reasons.items() if why and storage == "sparse"}
    initial, final = method.initial_counts(shapes), method.final_counts(shapes)
    rows = tuple(
        PlanRow(
            choice.name,
            tuple(choice.parameter.shape),
            choice.sparse,
            choice.reason + notes.get(choice.name, ""),
            initial.get(choice.name) if isinstance(initial, dict) else None,
            final.get(choice.name) if isinstance(final, dict) else None,
            prod(shapes[choice.name]) if choice.sparse else choice.parameter.numel(),
        )
        for choice in choices
    )
    active = [sum(counts.values()) if isinstance(counts, dict) else counts for counts in (initial, final)]
    return Plan(method, rows, *active, pattern)


def refuse(method: Method, pattern: Pattern, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reject a method that cannot obey the pattern, or whose common budget leaves a layer empty.

    Args:
        method: the method with its hyper-parameters.
        pattern: the pattern that every mask obeys.
        shapes: the shape of every sparse parameter, in units of the pattern.

    Raises:
        ValueError: says which of the two it is, and what to change.
    """
    pattern.refuse(method, shapes)
    final = method.final_counts(shapes)
    if isinstance(final, int) and final < len(shapes):
        raise ValueError(
            f"{method!r} leaves {final} active {pattern.unit} for {len(shapes)} layers, but each layer needs at least "
            "one: choose a lower sparsity, or leave layers dense with skip="
        )


def units_of(choices: Iterable[Choice], pattern: Pattern) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every sparse parameter in units of the pattern."""
    return {choice.name: pattern.shape(tuple(choice.parameter.shape)) for choice in choices if choice.sparse}


def storage_reasons(model: nn.Module, choices: Iterable[Choice]) -> dict[str, str]:
    """Returns why each sparse parameter stays in dense storage beside others in sparse storage; "" if it need not."""
    return {
        one.name: storages.reason_for_dense(model, one.name, one.parameter, one.aliases)
        for one in choices
        if one.sparse
    }


def layers_of(choices: Iterable[Choice], gradients: Mapping[str, torch.Tensor] | None = None) -> dict[str, Layer]:
    """Returns the sparse parameters as layers, each with the gradient of the same name, if there is one."""
    gradients = gradients or {}
    return {
        choice.name: Layer(choice.parameter.detach(), gradients.get(choice.name)) for choice in choices if choice.sparse
    }


def _share(count: int | None, size: int) -> str:
    """Returns a count with its share of `size` in percent, or "dense" for None."""
    return "dense" if count is None else f"{count:,} {count / size:6.1%}"
