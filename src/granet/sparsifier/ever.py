"""The weights that were active at any time so far: what R_s counts (in-time over-parameterization)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from granet.topology import count


class EverActive:
    """The union of all masks so far, by layer: a bit for each weight where masks lie in this process's memory.

    Args:
        masks: the first masks.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        self._shapes: dict[str, torch.Size] = {}  # of those in bits
        self._found: dict[str, np.ndarray | Tensor] = {}
        for name, mask in masks.items():
            self._put(name, mask)

    def _put(self, name: str, mask: Tensor) -> None:
        self._shapes.pop(name, None)
        if _is_plain(mask):
            self._shapes[name], self._found[name] = mask.shape, np.packbits(mask.numpy())
        else:
            self._found[name] = mask.clone()

    def add(self, masks: Mapping[str, Tensor]) -> None:
        """Adds masks, of some of the layers or of all."""
        for name, mask in masks.items():
            self._found[name] |= np.packbits(mask.numpy()) if name in self._shapes else mask

    def count(self) -> int:
        """Returns how many weights there are."""
        return sum(
            count(one) if isinstance(one, Tensor) else int(np.bitwise_count(one).sum(dtype=np.int64))
            for one in self._found.values()
        )

    def masks(self) -> dict[str, Tensor]:
        """Returns the unions as bool tensors."""
        return {name: one if isinstance(one, Tensor) else self._mask(name, one) for name, one in self._found.items()}

    def move(self, parameters: Mapping[str, Tensor], moved: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Moves to where the parameters are, by a function that moves masks; what is there already stays as it is."""
        away = [name for name in self._found if name not in self._shapes or not _is_plain(parameters[name].detach())]
        found = {name: one if isinstance(one := self._found[name], Tensor) else self._mask(name, one) for name in away}
        for name, mask in moved(found).items():
            self._put(name, mask)

    def _mask(self, name: str, bits: np.ndarray) -> Tensor:
        shape = self._shapes[name]
        return torch.from_numpy(np.unpackbits(bits, count=shape.numel()).view(bool)).view(shape)


def _is_plain(mask: Tensor) -> bool:
    return type(mask) is Tensor and mask.device.type == "cpu"
