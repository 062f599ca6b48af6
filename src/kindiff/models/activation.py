"""GELU by its tanh formula (Hendrycks & Gimpel 2016), DiT's activation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kindiff import native

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
"""Twice what the tangent is taken of is LINEAR x + CUBIC x^3."""


def gelu(x: Tensor) -> Tensor:
    """GELU of each number of a tensor, in the tensor's dtype; half precision is computed in fp32.

    The same function is x sigmoid(2 z), z being what the tangent is taken of: on a CPU torch's hyperbolic tangent is
    slow, so where it compiles the sigmoid is written out.
    """
    if native.usable(x):
        return native.gelu(x)
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        x_32 = x.float()
        return (x_32 * torch.sigmoid(x_32 * (LINEAR + CUBIC * x_32 * x_32))).to(x.dtype)
    return F.gelu(x, approximate="tanh")
