"""The dense network: every weight active, to compare with."""

from dataclasses import dataclass

from granet.methods.base import METHODS, Method


@METHODS.add("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Every weight is active, from the first step to the last."""
