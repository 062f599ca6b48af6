"""Kernels of our own for the CPU: what is between a block's large products, each in one pass over its arrays."""

from kindiff.native.calls import (
    DTYPES,
    across,
    add_,
    gelu,
    norm,
    residual,
    take,
    take_back,
    turn_back,
    usable,
)

__all__ = ["DTYPES", "across", "add_", "gelu", "norm", "residual", "take", "take_back", "turn_back", "usable"]
