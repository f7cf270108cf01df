"""Sets the inactive entries of tensors to exact zero in place, quickly, NaN included.

On the CPU an entry is cleared by a bitwise AND with all ones or all zeros, in pieces that stay in the cache: a fill
through a bool mask takes several times as long, and a multiplication keeps NaN and leaves -0.0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from granet import shards
from granet.sparsifier import quantised

_PIECE = 1 << 18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ALL = slice(None)

Work = Iterable[tuple[Tensor, Sequence[Tensor]]]


@torch.no_grad()
def clear(work: Work) -> None:
    """Sets the entries of tensors to zero where their mask is False.

    Args:
        work: pairs of a bool mask and the tensors of its shape that it clears in place.
    """
    scratch: dict[torch.dtype, Tensor] = {}
    for mask, tensors in _here(work):
        quick, slow = _by_layout(tensors, mask)
        for bits, flags, pieces in _walk(mask, quick):
            words = scratch.setdefault(bits, torch.empty(_PIECE, dtype=bits, device="cpu"))[: flags.numel()]
            active = words.copy_(flags).neg_()  # all bits set where active, none elsewhere
            for piece in pieces:
                piece.bitwise_and_(active)
        for tensor in slow:
            _fill(tensor, mask.logical_not())


@torch.no_grad()
def leaks(work: Work, *, together: bool = True, window: slice = _ALL) -> bool:
    """Returns whether any tensor has a nonzero (or NaN) entry where its mask is False. Waits for the device.

    Args:
        work: pairs of a bool mask and tensors of its shape.
        together: for shards, whether any rank finds one, which all ranks ask at the same time; else this rank alone.
        window: the entries that are looked at, in the order of their storage; all of a tensor that has another order
            than its mask, if the window begins at 0.
    """
    work = list(work)
    found = _leaks_here(_here(work), window)
    sharded = next((mask for mask, _ in work if shards.is_sharded(mask)), None)
    return found if sharded is None or not together else shards.anywhere(found, sharded)


class Watch:
    """Learns whether an optimizer keeps inactive entries at zero when it gets masked gradients.

    Most do, and then nothing needs clearing. An optimizer is trusted after a few steps in which weights could move and
    no inactive one did. From then on a part of the entries is checked after each step, all of them within 32 steps,
    because some optimizers begin to mix weights late or write slow weights back now and then. If a nonzero entry is
    found, everything is cleared after each step. The optimizer is trusted again after a hundred clean steps, since
    the weights may merely have been loaded; after a second find it never is.

    Attributes:
        kept: whether the optimizer keeps them at zero; None until that is known.
    """

    LOOKS, PROBATION, SHARE, LEAST, EVERY = 3, 100, 32, 2, 16
    SIZES = 1 << 14, 1 << 18  # entries in a piece, at least and at most

    def __init__(self):
        self.kept: bool | None = None
        self._clean = self._finds = self._steps = 0
        self._order: list[tuple[str, slice]] = []  # pieces of tensors, in the order in which they are looked at

    def renew(self) -> None:
        """Starts anew after the masks have changed: a trusted optimizer has to earn that again."""
        self._order = []
        if self.kept:
            self.kept, self._clean = None, 0

    def settle(
        self, moves: Callable[[], bool], masks: Mapping[str, Tensor], held: Callable[[Iterable[str]], Work]
    ) -> bool:
        """Checks and clears as needed, and returns whether a trusted optimizer has moved inactive entries.

        Args:
            moves: whether the step just taken could move weights: not with a learning rate of zero.
            masks: the masks of what the optimizer holds.
            held: gives, for some of their names, the masks with the tensors that must be zero where they are inactive.
        """
        self._steps += 1
        if self.kept:
            if not self._found(masks, held):
                return False
            clear(held(masks))
            self._finds += 1
            self.kept, self._clean = (None if self._finds == 1 else False), 0
            return True
        if self.kept is False or leaks(held(masks)):
            clear(held(masks))
            self.kept, self._clean = False, 0
        else:
            self._clean += moves()
            self.kept = self._clean >= (self.PROBATION if self._finds else self.LOOKS) or None
        return False

    def _found(self, masks: Mapping[str, Tensor], held: Callable[[Iterable[str]], Work]) -> bool:
        """Returns whether the part that is due after this step has a nonzero inactive entry."""
        first = next(iter(masks.values()))
        if shards.is_sharded(first) or first.device.type != "cpu":  # ranks, or the host, would wait at every step
            return self._steps % self.EVERY == 0 and leaks(held(masks))
        if not self._order:
            least, most = self.SIZES
            size = min(max(sum(mask.numel() for mask in masks.values()) // (2 * self.SHARE), least), most)
            self._order = [
                (name, slice(start, start + size))
                for name, mask in masks.items()
                for start in range(0, mask.numel(), size)
            ]
        take = min(max(self.LEAST, -(-len(self._order) // self.SHARE)), len(self._order))
        part, self._order = self._order[:take], self._order[take:]
        self._order += part
        return any(leaks(held([name]), window=window) for name, window in part)


def was_masked(grad: Tensor, mask: Tensor) -> bool:
    """Returns whether the gradients of inactive weights, all of them zero, were masked by other code.

    They are zero as well where an input or an output is dead, or a tap of a kernel meets padding alone. So at least
    ten must lie where gradients reach other weights of the same input, of the same output and of the same tap.
    """
    if grad.ndim < 2 or shards.is_sharded(grad):
        return False
    live = (grad != 0).reshape(*grad.shape[:2], -1)
    inactive = mask.logical_not().reshape(live.shape)
    for along in ((1, 2), (0, 2), (0, 1)):
        inactive = inactive & live.any(along, keepdim=True)
    return int(inactive.sum()) >= 10


def _here(work: Work) -> Work:
    """Yields the parts of masks and tensors that lie on this rank; some ranks have none."""
    parts = ((shards.local(mask), [shards.local(tensor) for tensor in tensors]) for mask, tensors in work)
    return ((mask, tensors) for mask, tensors in parts if mask.numel())


def _leaks_here(work: Work, window: slice = _ALL) -> bool:
    scratch: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    for mask, tensors in work:
        quick, slow = _by_layout(tensors, mask)
        for bits, flags, pieces in _walk(mask, quick, window):
            pair = scratch.setdefault(bits, tuple(torch.empty(_PIECE, dtype=bits, device="cpu") for _ in range(2)))
            words, left = (buffer[: flags.numel()] for buffer in pair)
            # all bits but the sign set where inactive, so that -0.0 counts as zero
            inactive = words.copy_(flags).sub_(1).bitwise_and_(torch.iinfo(bits).max)
            if any(torch.bitwise_and(piece, inactive, out=left).max() > 0 for piece in pieces):
                return True
        if not window.start and any(_nonzero(tensor).logical_and_(mask.logical_not()).any() for tensor in slow):
            return True
    return False


def _fill(tensor: Tensor, inactive: Tensor) -> None:
    quantised.clear(tensor, inactive) if quantised.is_quantised(tensor) else tensor.masked_fill_(inactive, 0)


def _nonzero(tensor: Tensor) -> Tensor:
    return quantised.nonzero(tensor) if quantised.is_quantised(tensor) else tensor != 0


def like(mask: Tensor, parameter: Tensor) -> Tensor:
    """Returns `mask` on the parameter's device, in its memory layout, and sharded as the parameter is."""
    if shards.is_sharded(parameter) or shards.is_sharded(mask):
        return shards.place_like(mask, parameter)
    if mask.device == parameter.device and mask.stride() == parameter.stride():
        return mask
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


def _same_layout(tensor: Tensor, mask: Tensor) -> bool:
    """Whether the bits of `tensor` can be walked along with `mask`: on the CPU, dense, real, in the same order."""
    return (
        not quantised.is_quantised(tensor)
        and tensor.device.type == "cpu"
        and all(a == b for a, b, n in zip(tensor.stride(), mask.stride(), mask.shape, strict=True) if n > 1)
        and tensor.is_floating_point()
        and torch.ops.aten.is_non_overlapping_and_dense(tensor)
    )


def _by_layout(tensors: Sequence[Tensor], mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors whose bits can be walked along with `mask`, and the others."""
    quick = [_same_layout(tensor, mask) for tensor in tensors]
    return [t for t, q in zip(tensors, quick, strict=True) if q], [
        t for t, q in zip(tensors, quick, strict=True) if not q
    ]


def _walk(
    mask: Tensor, tensors: Sequence[Tensor], window: slice = _ALL
) -> Iterator[tuple[torch.dtype, Tensor, tuple[Tensor, ...]]]:
    """Pieces of `mask` as 0 and 1 with the same pieces of the tensors as integers, tensors of one width together.

    Of the entries in the window alone.
    """
    flags = _split(_storage_order(mask).view(torch.int8)[window]) if tensors else ()
    for bits in dict.fromkeys(_BITS[tensor.element_size()] for tensor in tensors):
        same = [_split(_storage_order(t).view(bits)[window]) for t in tensors if _BITS[t.element_size()] == bits]
        for piece, *values in zip(flags, *same, strict=True):
            yield bits, piece, tuple(values)


def _split(flat: Tensor) -> Sequence[Tensor]:
    return flat.split(_PIECE) if flat.numel() > _PIECE else (flat,)


def _storage_order(tensor: Tensor) -> Tensor:
    """A view of a dense tensor with one dimension, in the order of its storage."""
    return tensor.as_strided((tensor.numel(),), (1,))
