"""The weights of a captured graph: their values when a plan is packed, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

SAMPLES = 4  # numbers of each tensor that are compared at every call


class Constants:
    """The tensors that a graph computes from parameters and buffers alone.

    Nothing is computed before somebody asks for it. `used` gives the places of the arguments that were looked at.

    Args:
        weights: the placeholders that stand for parameters and buffers, with their places among the arguments.
        args: the arguments of a call.
    """

    def __init__(self, weights: dict[fx.Node, int], args: Sequence[object]):
        self._weights, self._args = weights, args
        self._known: dict[fx.Node, Tensor | None] = {}
        self.used: set[int] = set()

    def __contains__(self, node: object) -> bool:
        """Whether the node's result depends on parameters and buffers only, and on no randomness."""
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
        """The node's result."""
        if node not in self._known:
            if node.op == "placeholder":
                place = self._weights[node]
                self.used.add(place)
                self._known[node] = self._args[place].detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.__getitem__)
                self._known[node] = node.target(*args, **kwargs)
        return self._known[node]


class Watch:
    """Notices that the tensors a plan was packed from have changed.

    It compares identity, place in memory, version and a sample of the values. A write through `.data` or by code
    outside of torch that keeps the sampled values is the only change that cannot be seen.
    """

    def __init__(self, args: Sequence[object], places: Sequence[int]):
        self._kept = [(i, args[i], args[i].data_ptr(), _version(args[i])) for i in sorted(places)]
        self._views = [_sample(t.detach()) for _, t, _, _ in self._kept]
        self._values = self._read()

    def _read(self) -> Tensor | None:
        return torch.cat(self._views) if self._views else None

    def same(self, args: Sequence[object]) -> bool:
        """Whether the tensors are those that were kept, with the values they had."""
        for i, tensor, pointer, version in self._kept:
            now = args[i]
            if now is not tensor or now.data_ptr() != pointer or _version(now) != version:
                return False
        return self._values is None or torch.equal(self._read().view(torch.int32), self._values.view(torch.int32))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    """A view of a few numbers of a tensor, spread over it and not zero if most of it is."""
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
