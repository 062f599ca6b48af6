"""GELU by its tanh formula (Hendrycks & Gimpel 2016), DiT's activation.

On a CPU torch's operation spends most of its time on the hyperbolic tangent. The same function is x sigmoid(2 z), z
being what the tangent is taken of, and the sigmoid costs a third (benchmarks/operations.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
"""2 z = LINEAR x + CUBIC x^3."""
CHUNK = 2**18
"""Numbers that go through GELU at a time on a CPU: what one operation hands to the next stays in the cache."""


def gelu(x: Tensor) -> Tensor:
    """GELU of each number of a tensor, in the tensor's dtype; half precision is computed in fp32."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    if torch.compiler.is_compiling():
        x_32 = x.float()
        return (x_32 * torch.sigmoid(x_32 * (LINEAR + CUBIC * x_32 * x_32))).to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x)  # type: ignore[no-any-return]
    return _gelu(x, 1)[0]


class _Gelu(torch.autograd.Function):
    """GELU whose derivative is made with it, by the same sigmoid, and kept in the input's place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, slope = _gelu(x, 2)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return dy * slope


def _gelu(x: Tensor, count: int) -> list[Tensor]:
    """GELU of x, and with a count of two its derivative."""
    x = x.contiguous()
    results = [torch.empty_like(x) for _ in range(count)]
    scratch = torch.empty(1 + count, min(x.numel(), CHUNK)) if x.itemsize < 4 else None
    for start in range(0, x.numel(), CHUNK):
        places = [tensor.view(-1)[start : start + CHUNK] for tensor in (x, *results)]
        if scratch is None:
            _into(*places)
            continue
        wide = [row[: len(places[0])] for row in scratch]
        wide[0].copy_(places[0])
        _into(*wide)
        for place, row in zip(places[1:], wide[1:], strict=True):
            place.copy_(row)
    return results


def _into(x: Tensor, y: Tensor, slope: Tensor | None = None) -> None:
    """y = x s with s = sigmoid(2 z); slope = s (1 + x (1 - s) (2 z)')."""
    linear = x.new_full((), LINEAR)
    s = torch.addcmul(linear, x, x, value=CUBIC, out=y).mul_(x).sigmoid_()
    if slope is not None:
        torch.addcmul(linear, x, x, value=3 * CUBIC, out=slope)
        slope.addcmul_(slope, s, value=-1).mul_(x)
        torch.addcmul(s, s, slope, out=slope)
    s.mul_(x)
