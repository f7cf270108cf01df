"""The weight of one layer as its active values alone.

The module keeps its type, its other parameters and its own forward. In the place of the parameter `weight` it has
`values`, one number for each active weight in the order of the flat index, and `positions`, their flat indices. Whoever
reads `module.weight`, the module's own forward or other code, gets a dense tensor that is made on the spot, through
which gradients flow to the values. Within the module's forward autograd keeps the values instead of that tensor, and
makes it once more in the backward: so there is one dense weight at a time. Model state dicts have the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from granet.sparsifier.sparse_storage import linear
from granet.sparsifier.sparse_storage.linear import CHANGED, Listener
from granet.sparsifier.sparse_storage.values import dense, positions_of, taken

SHAPE = "_dense_shape"
LOADED = "_loaded_weight"  # the weight that was loaded last; True if it was zero outside of the positions

_listeners: WeakKeyDictionary[nn.Module, Callable[[nn.Module], Listener | None]] = WeakKeyDictionary()
_made: ContextVar[dict | None] = ContextVar("made", default=None)  # dense weights of the forward under way, by memory


class _Densify(torch.autograd.Function):
    """Values at their places of a dense tensor, zeros elsewhere; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return dense(values, positions, shape, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, positions, _, _ = inputs
        ctx.save_for_backward(positions)
        ctx.size, ctx.dtype = len(values), values.dtype

    @staticmethod
    def backward(ctx, grad):
        (positions,) = ctx.saved_tensors
        taken = grad.reshape(-1).index_select(0, positions).to(ctx.dtype)
        if ctx.size > len(taken):  # room for more values than there are positions
            taken = torch.cat([taken, taken.new_zeros(ctx.size - len(taken))])
        return taken, None, None, None


def is_stored(model: nn.Module) -> bool:
    """Whether the model has layers in sparse storage."""
    return any(SHAPE in vars(module) for module in model.modules())


def shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """Returns the shape of the module's dense weight, None if the module has a weight of its own."""
    return vars(module).get(SHAPE)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Returns the type that the module has outside of sparse storage."""
    return type(module) if shape_of(module) is None else type(module)._plain


@torch.no_grad()
def store(module: nn.Module, mask: Tensor) -> nn.Parameter:
    """Puts the active values of the module's weight in the place of the weight, and returns them as its parameter."""
    weight = module._parameters["weight"]
    positions = positions_of(mask).to(weight.device)
    values = nn.Parameter(taken(weight.detach(), positions), requires_grad=weight.requires_grad)
    others = {key: value for key, value in module._parameters.items() if key != "weight"}
    module._parameters.clear()
    module.__class__ = _class_of(type(module))
    module.__dict__[SHAPE] = tuple(weight.shape)
    module.register_parameter("values", values)
    module._parameters.update(others)
    module.register_buffer("positions", positions, persistent=False)
    return values


@torch.no_grad()
def unstore(module: nn.Module) -> None:
    """Gives the module its own class and a dense weight back."""
    weight = nn.Parameter(dense(module.values, module.positions, shape_of(module)), module.values.requires_grad)
    others = {key: value for key, value in module._parameters.items() if key != "values"}
    module._parameters.clear()
    del module._buffers["positions"]
    module._non_persistent_buffers_set.discard("positions")
    module.__dict__.pop(SHAPE)
    module.__dict__.pop(LOADED, None)
    module.__class__ = type(module)._plain
    module.register_parameter("weight", weight)
    module._parameters.update(others)


def listen(module: nn.Module, listener: Callable[[nn.Module], Listener | None]) -> None:
    """Has `listener(module)` asked, whenever a dense weight is made, for what is to see its gradient."""
    _listeners[module] = listener


@torch.no_grad()
def reposition(module: nn.Module, mask: Tensor, *, fixed: bool) -> bool:
    """Has the module hold the weights at a mask's places, from what it holds or was loaded last; others are zero.

    Returns whether all of them are known: those at new places are not, unless a whole weight was loaded.
    """
    loaded = vars(module).get(LOADED)
    known = loaded if isinstance(loaded, Tensor) else dense(module.values, module.positions, shape_of(module))
    positions, before = positions_of(mask), len(module.positions)
    stays = before == len(positions) and torch.equal(positions, module.positions)
    old = torch.zeros_like(mask).view(-1).index_fill_(0, module.positions.long(), True).view(mask.shape)
    if not stays:
        size = max(len(module.values), len(positions)) if fixed else len(positions)
        values = module.values.new_zeros(size)
        values[: len(positions)] = known[mask]
        place(module, values, positions)
    return loaded is not None or not (mask & ~old).any()


@torch.no_grad()
def place(module: nn.Module, values: Tensor, positions: Tensor) -> None:
    """Puts other values at other positions into the module; its parameter stays the same object."""
    put(module.values, values)
    module.positions = positions


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> None:
    """Puts numbers into a one-dimensional tensor, which changes its size for them."""
    if parameter.shape == values.shape:
        parameter.copy_(values)
        return
    parameter.grad = None
    # Autograd remembers a parameter's shape as long as any graph of it lives, and forgets it with its type.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = values.to(parameter.device).contiguous()


def was_loaded(module: nn.Module) -> bool:
    """Whether a weight was loaded since the last call of `forget_loaded`."""
    return LOADED in vars(module)


def forget_loaded(module: nn.Module) -> int:
    """Drops what was loaded outside of the positions, and returns how many of these weights were not zero."""
    loaded = module.__dict__.pop(LOADED, None)
    if not isinstance(loaded, Tensor):
        return 0
    return int(loaded.count_nonzero()) - int(loaded.reshape(-1)[module.positions.long()].count_nonzero())


def _weight(module: nn.Module) -> Tensor:
    """The property `weight`."""
    values, positions, shape = module.values, module.positions, shape_of(module)
    kind = values.device.type
    recipes = _made.get()
    cast = recipes is not None and torch.is_autocast_enabled(kind) and values.dtype == torch.float32
    dtype = torch.get_autocast_dtype(kind) if cast else values.dtype
    made = _Densify.apply(values, positions, shape, dtype)
    if made.requires_grad and not _transformed() and (listener := _listener_of(module)) is not None:
        made.register_hook(lambda grad: listener(module, [(0, grad.reshape(-1))]))
    if recipes is not None:
        recipes[made.untyped_storage().data_ptr()] = made, _Recipe(values, positions, shape, dtype)
    return made


def _listener_of(module: nn.Module) -> Listener | None:
    """What is to see the dense gradient of the forward under way."""
    ask = _listeners.get(module)
    return None if ask is None else ask(module)


def _transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Recipe:
    """How to make a dense weight again, for as long as its values have not changed."""

    def __init__(self, values: Tensor, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype):
        self.values, self.positions, self.shape, self.dtype = values.detach(), positions, shape, dtype
        self.version = values._version

    def __call__(self) -> Tensor:
        """Returns the dense weight."""
        if self.values._version != self.version:
            raise RuntimeError(CHANGED)
        return dense(self.values, self.positions, self.shape, self.dtype)


def _forward(plain: type[nn.Module], module: nn.Module, *inputs: object, **named: object) -> object:
    """The module's own forward, in which autograd keeps values instead of the dense weight."""
    x = next(iter((*inputs, *named.values())), None)
    if plain.forward is nn.Linear.forward and not _transformed() and linear.is_for(module, shape_of(module), x):
        return linear.apply(module, x, shape_of(module), _listener_of(module) if torch.is_grad_enabled() else None)
    if not torch.is_grad_enabled() or _transformed():
        return plain.forward(module, *inputs, **named)
    recipes: dict[int, tuple[Tensor, _Recipe]] = {}
    token = _made.set(recipes)

    def pack(tensor: Tensor) -> object:
        found = recipes.get(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided else None
        return tensor if found is None else (found[1], tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: object) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, *view = packed
        return recipe().as_strided(*view)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return plain.forward(module, *inputs, **named)
    finally:
        _made.reset(token)
        recipes.clear()


def _save(plain: type[nn.Module], module: nn.Module, destination: dict, prefix: str, keep_vars: bool) -> None:
    """The state dict's entries: those of the dense module, in its order."""
    before = set(destination)
    plain._save_to_state_dict(module, destination, prefix, keep_vars)
    for key in [key for key in destination if key not in before]:
        value = destination.pop(key)
        if key == f"{prefix}values":
            key, value = f"{prefix}weight", dense(module.values, module.positions, shape_of(module))
        destination[key] = value


def _load(
    plain: type[nn.Module],
    module: nn.Module,
    state_dict: dict,
    prefix: str,
    metadata: dict,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Loads the entries of the dense module; what is not zero outside of the positions is kept until the first step."""
    key, own = f"{prefix}weight", f"{prefix}values"
    inner = {name: value for name, value in state_dict.items() if name.startswith(prefix) and name != key}
    if own in inner:
        unexpected += [own] if strict else []
    given = state_dict.get(key)
    if given is None:
        inner[own] = module.values.detach()
        missing += [key] if strict else []
    elif tuple(given.shape) != shape_of(module):
        errors.append(
            f"size mismatch for {key}: copying a param with shape {tuple(given.shape)} from checkpoint, the shape in "
            f"current model is {shape_of(module)}."
        )
    else:
        with torch.no_grad():
            given = given.detach().to(module.values)
            at = module.positions.long()
            module.values[: len(at)] = given.reshape(-1)[at]
            more = int(given.count_nonzero()) > int(module.values.count_nonzero())
            module.__dict__[LOADED] = given.clone() if more else True
            inner[own] = module.values.detach()
    metadata = {k: v for k, v in metadata.items() if k != "assign_to_params_buffers"}
    plain._load_from_state_dict(module, inner, prefix, metadata, strict, missing, unexpected, errors)


@cache
def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """The class `plain` for a module in sparse storage."""

    def bound(function: Callable) -> Callable:
        return lambda module, *args, **named: function(plain, module, *args, **named)

    def reduce(module: nn.Module, protocol: int) -> tuple:
        return _revive, (plain,), vars(module).copy()

    names = {
        "_plain": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": reduce,
        "weight": property(_weight),
        "forward": torch.compiler.disable(bound(_forward)),
        "_save_to_state_dict": bound(_save),
        "_load_from_state_dict": bound(_load),
    }
    return type(plain.__name__, (plain,), names)


def _revive(plain: type[nn.Module]) -> nn.Module:
    kind = _class_of(plain)
    return kind.__new__(kind)
