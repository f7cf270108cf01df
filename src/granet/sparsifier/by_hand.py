"""Loops that call `before_step` and `after_step` themselves, around each step of an optimizer without hooks."""

from __future__ import annotations

from torch.optim import Optimizer

from granet.sparsifier import stepping
from granet.sparsifier.attachment import Attachment


class ByHand:
    """The part of a `Sparsifier` that counts these calls, and finds those that a loop has left out."""

    _attached: Attachment | None

    def __init__(self):
        self._no_calls()

    def _no_calls(self) -> None:
        """Begins to count anew."""
        self._by_hand = (0, 0)  # calls of before_step() and of after_step(), since the sparsifier was attached
        self._readied = False  # whether the latest of these calls was one of before_step()
        self._calls_seen: dict[int, tuple[int, int]] = {}  # those calls, as they were at each optimizer's last step

    def _warn(self, kind: str, message: str) -> None:
        raise NotImplementedError

    def _called_by_hand(self, verb: str) -> None:
        """Counts a call of `before_step` or `after_step`.

        Raises:
            RuntimeError: nothing is attached, hooks make the same call already, or the other call is missing.
        """
        if self._attached is None:
            if verb == "after_step":
                return  # detached in the step, say
            raise RuntimeError("attach(optimizer) comes before the first step: the optimizer's buffers must stay clean")
        if self._attached.hooked:
            raise RuntimeError(
                f"{verb}() was called, and attach(optimizer) has hooked the optimizer, whose every step does this "
                "already: leave the call out, or use attach(optimizer, hooks=False)"
            )
        before, after = self._by_hand
        if verb == "after_step" and not self._readied:
            raise RuntimeError(
                "after_step() was called without before_step(), which comes right before the optimizer's step"
            )
        self._readied = verb == "before_step"
        self._by_hand = (before + self._readied, after + (not self._readied))

    def _misses_a_call(self, optimizer: Optimizer) -> bool:
        """Returns whether a loop without hooks has left out `before_step` or `after_step`, and warns once if so."""
        if stepping.found_inf(optimizer):  # it was called and did nothing
            return False
        before, after = self._calls_seen.get(id(optimizer), (0, -1))
        self._calls_seen[id(optimizer)] = now = self._by_hand
        missing = "before_step" if now[0] == before else "after_step" if now[1] == after else ""
        if missing:
            self._warn(
                "by hand",
                f"{type(optimizer).__name__}, attached with hooks=False, has stepped without {missing}(): such a loop "
                "calls before_step() right before each step of the optimizer and after_step() right after it. Without "
                "them the model becomes dense and no step is counted. attach(optimizer) does both by itself",
            )
        return bool(missing)
