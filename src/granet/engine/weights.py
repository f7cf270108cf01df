"""The weights of a captured graph: their values when it is packed, and the check whether they have changed since."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx

SAMPLES = 4  # values of each tensor that are compared at every call


class Constants:
    """The tensors that a graph computes from parameters and buffers alone. Each is computed when it is first needed.

    Attributes:
        used: the positions of the arguments that were needed so far.

    Args:
        weights: the placeholders that stand for parameters and buffers, with their positions among the arguments.
        args: the arguments of a call.
    """

    def __init__(self, weights: dict[fx.Node, int], args: Sequence[object]):
        self._weights, self._args = weights, args
        self._known: dict[fx.Node, Tensor | None] = {}
        self.used: set[int] = set()

    def __contains__(self, node: object) -> bool:
        """Returns whether the node's result depends on parameters and buffers only, and on no randomness."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "placeholder":
            return node in self._weights
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        return all(n in self for n in node.all_input_nodes)

    def __getitem__(self, node: fx.Node) -> Tensor:
        """Returns the node's result."""
        if node not in self._known:
            if node.op == "placeholder":
                place = self._weights[node]
                self.used.add(place)
                self._known[node] = self._args[place].detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.__getitem__)
                self._known[node] = node.target(*args, **kwargs)
        return self._known[node]


class WeightCheck:
    """A check whether the tensors that a graph was packed from are still the same.

    It compares their identity, place in memory, version and a sample of their values. The only change that it cannot
    see is a write that does not count as a new version, through `.data` or by code outside of torch, and that keeps the
    sampled values.

    Args:
        args: the arguments of a call.
        places: the positions of the tensors among the arguments.
    """

    def __init__(self, args: Sequence[object], places: Collection[int]):
        self._places = sorted(places)
        self._tensors = [args[i] for i in self._places]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others have no version
        self._counted, self._versions = counted, [tensor._version for tensor in counted]
        # The views keep the memory alive that is read below.
        self._views = [view for tensor in self._tensors if (view := _sample(tensor.detach())).numel()]
        addresses = [view.data_ptr() + 4 * i * view.stride(0) for view in self._views for i in range(len(view))]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        none = torch.zeros(0, dtype=torch.int32, device="cpu")
        self._words = torch.cat([none, *(view.view(torch.int32) for view in self._views)])

    def same(self, args: Sequence[object]) -> bool:
        """Returns whether the tensors among the arguments are those that were kept, with the values they had."""
        tensors = self._tensors
        return (
            all(map(operator.is_, [args[i] for i in self._places], tensors))
            and list(map(Tensor.data_ptr, tensors)) == self._pointers
            and list(map(_version, self._counted)) == self._versions
            and torch.ops.granet.words_are(self._addresses, self._words)
        )


_version = operator.attrgetter("_version")


def _sample(tensor: Tensor) -> Tensor:
    """Returns a view of a few numbers of a tensor, spread over it and not zero if most of it is.

    The view is one-dimensional; it is empty where the tensor holds no float32 numbers.
    """
    if tensor.numel() == 0 or tensor.dtype != torch.float32:
        return torch.zeros(0)
    if not tensor.is_contiguous():
        tensor = tensor[(slice(0, 1),) * tensor.dim()]
        return tensor.as_strided((1,), (1,), tensor.storage_offset())
    flat = tensor.view(-1)
    places = flat.nonzero().view(-1) if flat.numel() > SAMPLES else flat.new_zeros(0)
    first = int(places[0]) if len(places) else 0
    if len(places) > 1:
        last = int(places[len(places) // 2])
        step = max(1, (last - first))
        return flat[first::step][:SAMPLES]
    return flat[first :: max(1, flat.numel() // SAMPLES)][:SAMPLES]
