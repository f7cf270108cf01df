"""The storages of weights, dense and sparse: which layers and methods can train in sparse storage, and why not.

What sparse storage is, and how it works: `granet.sparsifier.sparse_storage`.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from granet import shards
from granet.methods.base import Method
from granet.names import unknown

STORAGES = ("dense", "sparse")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # those that sparse storage can hold


def reason_for_dense(model: nn.Module, name: str, parameter: nn.Parameter, aliases: Sequence[str] = ()) -> str:
    """Returns why a sparse parameter of the model stays in dense storage, "" if it need not; `aliases`: other names."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if aliases:
        return f"it is also {aliases[0]!r}"
    if isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module):
        return "it is under a parametrization"
    if leaf != "weight" or not isinstance(module, LAYERS):
        return f"sparse storage has linear and convolution layers, not {leaf!r} of {type(module).__name__}"
    if shards.is_sharded(parameter):
        return "it is sharded over ranks"
    if type(parameter) is not nn.Parameter:
        return f"its weight is a {type(parameter).__name__}"
    if "forward" in vars(module):
        return "its forward was exchanged"
    return ""


def refuse(storage: str, method: Method, reasons: Mapping[str, str]) -> None:
    """Rejects a storage that does not exist, and what cannot train in sparse storage.

    Args:
        storage: the storage that is asked for.
        method: the method with its hyper-parameters.
        reasons: why sparse parameters stay in dense storage, by name; "" for those that need not.

    Raises:
        ValueError: says which of storage, method and layers it is, and what to do.
    """
    if storage not in STORAGES:
        raise ValueError(unknown("storage", storage, STORAGES))
    if storage == "dense":
        return
    kind, instead = type(method).__name__, 'use storage="dense"'
    if method.reparameterizes or method.drifts or method.remembers:
        raise ValueError(f"{kind} needs all weights at every step, and sparse storage has the active ones: {instead}")
    if method.averages_gradients:
        raise ValueError(
            f"{kind} averages the dense gradients of several steps here, which take the memory of dense weights: "
            f'{instead}, or choose growth="gradient" and accumulate=1'
        )
    if not method.needs_probe and method.sparsity_at(0) == 0:
        raise ValueError(f"{kind} starts dense here, which takes more memory in sparse storage: {instead}")
    if all(reasons.values()):
        name, why = next(iter(reasons.items()))
        raise ValueError(f"no layer can be in sparse storage ({name!r}: {why}): {instead}")
