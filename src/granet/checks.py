"""What is asked of a model and its parameters before they are made sparse, and while they are."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from granet.methods import METHODS
from granet.methods.base import Method
from granet.names import described, did_you_mean


def require_kinds(model, method, **numbers) -> None:
    """Rejects a model, a method or whole numbers of the wrong type. A method is a value, not its class or its name.

    Raises:
        TypeError: if one of them has the wrong type.
    """
    if not isinstance(model, nn.Module):
        turned = ": the model comes first, then the method" if isinstance(method, nn.Module) else ""
        raise TypeError(f"the model is {described(model)}, and a torch.nn.Module is needed{turned}")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is {described(number)}, and a whole number is needed")
    if isinstance(method, Method):
        return
    names = {kind.__name__.lower(): kind.__name__ for kind in METHODS.values()}
    given = method.__name__ if isinstance(method, type) else str(method).replace("-", "").replace("_", "")
    near = did_you_mean(given.lower(), names).partition("'")[2].rstrip("'?")
    kind = names.get(given.lower()) or names.get(near) or "RigL"
    raise TypeError(
        f"the method is {described(method)}, and a value with its settings is needed, granet.{kind}(...) for example"
    )


def holds(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether `parameter` is in the model: under this name, or under another one that a wrapper has given it since."""
    path, _, leaf = name.rpartition(".")
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    if module is not None and module._parameters.get(leaf) is parameter:
        return True
    return any(parameter is other for other in model.parameters())


def refuse_sparse_gradients(name: str, module: nn.Module) -> None:
    """Raises ValueError if the gradients of the parameter of `module` are sparse: those cannot be masked."""
    if getattr(module, "sparse", False) is True and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise ValueError(
            f"{name!r} has sparse gradients, which cannot be masked: make the {type(module).__name__} with "
            f"sparse=False, or leave it dense with skip={name!r}"
        )


def refuse_pruned(name: str, module: nn.Module) -> None:
    """Raises ValueError if torch's pruning computes the weight from the parameter of `module`."""
    leaf = name.rpartition(".")[2]
    steps = module if isinstance(module, parametrize.ParametrizationList) else ()
    masked = any(isinstance(getattr(step, "mask", None), Tensor) for step in steps)
    if masked or (leaf.endswith("_orig") and f"{leaf.removesuffix('_orig')}_mask" in module._buffers):
        raise ValueError(
            f"{name!r} is pruned by {'torch.ao.pruning' if masked else 'torch.nn.utils.prune'}, which computes the "
            "weight from it: call masks = granet.import_masks(model) first, and give them to "
            "Sparsifier(..., masks=masks)"
        )
