"""Kernels of our own for the CPU: whole passes of layers of components, attention, what is between a block's products,
and the tailors' Adam."""

from kindiff.native.calls import (
    DTYPES,
    MATRIX_UNITS,
    PRODUCTS,
    across,
    add_,
    multiplies,
    multiply,
    multiply_turned,
    usable,
)
from kindiff.native.functions import attention, gelu, norm, residual
from kindiff.native.layers import layers_backward, layers_forward
from kindiff.native.optimiser import adam_rows_

__all__ = [
    "DTYPES",
    "MATRIX_UNITS",
    "PRODUCTS",
    "across",
    "adam_rows_",
    "add_",
    "attention",
    "gelu",
    "layers_backward",
    "layers_forward",
    "multiplies",
    "multiply",
    "multiply_turned",
    "norm",
    "residual",
    "usable",
]
