"""Calibration data of an export to int8."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from granet.export.network import Network


def examples(network: Network, calibration: Iterable[object] | None, precision: str) -> list[tuple[Tensor, ...]]:
    """Returns the arguments in the batches of calibration data; none in float32.

    Raises:
        ValueError: int8 without calibration data, calibration data without int8, or data that do not fit or hold NaN.
    """
    if precision != "int8":
        if calibration is not None:
            raise ValueError(f"calibration= is for precision='int8', not for {precision!r}")
        return []
    batches = [calibration] if isinstance(calibration, Tensor) else calibration or ()
    found = [network.arguments(batch)[0] for batch in batches]
    if not found:
        raise ValueError("precision='int8' needs calibration=: batches of real inputs, a few hundred examples in all")
    if not all(one.isfinite().all() for batch in found for one in batch):
        raise ValueError("the calibration data holds NaN or infinite values, which int8 cannot represent")
    return found
