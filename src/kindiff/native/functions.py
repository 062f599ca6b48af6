"""What is between a block's products, as functions that autograd knows, by the kernels of blocks.cpp and attention.cpp.

B batch, H heads, T tokens, D features, E features of a head. There is no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kindiff.native.calls import call, fp32_like, pieces_of, summed


def norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer normalisation, then times 1 + scale plus shift, in a dtype. x is fp32."""
    return _Norm.apply(x_BND, shift_BD, scale_BD, eps, dtype)  # type: ignore[no-any-return]


def residual(x_BND: Tensor, gate_BD: Tensor, y_BND: Tensor) -> Tensor:
    """x + gate y, in fp32. x is fp32."""
    return _Residual.apply(x_BND, gate_BD, y_BND)  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula, in the tensor's dtype."""
    return _Gelu.apply(x)  # type: ignore[no-any-return]


def attention(q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, heads: int) -> Tensor:
    """Attention of each head over the tokens, (B, T, D): softmax(q k^T / sqrt(E)) v. Backward keeps the softmax."""
    return _Attention.apply(q_BTD, k_BTD, v_BTD, heads)  # type: ignore[no-any-return]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        x_BND = x_BND.contiguous()
        batch, tokens, width = x_BND.shape
        shift_BD, scale_BD, stride = _conditions(shift_BD, scale_BD, batch)
        y_BND = torch.empty_like(x_BND, dtype=dtype)
        moments = x_BND.new_empty(batch, tokens, 2)
        call("norm", y_BND, x_BND, shift_BD, scale_BD, stride, y_BND, moments, batch, tokens, width, eps)
        ctx.save_for_backward(x_BND, scale_BD, moments)
        return y_BND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_BND: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, scale_BD, moments = ctx.saved_tensors
        batch, tokens, width = x_BND.shape
        pieces = pieces_of(batch)
        dx_BND, dshift, dscale = torch.empty_like(x_BND), *fp32_like(x_BND, 2, batch, pieces, width)
        dy_BND = dy_BND.contiguous()
        call(
            "norm_back", dy_BND, dy_BND, x_BND, scale_BD, scale_BD.stride(0), moments, dx_BND, dshift, dscale,
            batch, tokens, width, pieces,
        )  # fmt: skip
        return dx_BND, summed(dshift), summed(dscale), None, None


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, gate_BD: Tensor, y_BND: Tensor) -> Tensor:
        x_BND, y_BND = x_BND.contiguous(), y_BND.contiguous()
        gate_BD, _, stride = _conditions(gate_BD, gate_BD, len(x_BND))
        z_BND = torch.empty_like(x_BND)
        call("residual", y_BND, x_BND, gate_BD, stride, y_BND, z_BND, *x_BND.shape)
        ctx.save_for_backward(gate_BD, y_BND)
        return z_BND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dz_BND: Tensor) -> tuple[Tensor | None, ...]:
        gate_BD, y_BND = ctx.saved_tensors
        batch, tokens, width = y_BND.shape
        pieces = pieces_of(batch)
        dz_BND, dy_BND, dgate = (
            dz_BND.contiguous(),
            torch.empty_like(y_BND),
            fp32_like(y_BND, batch, pieces, width),
        )
        call(
            "residual_back", y_BND, dz_BND, gate_BD, gate_BD.stride(0), y_BND, dy_BND, dgate,
            batch, tokens, width, pieces,
        )  # fmt: skip
        return dz_BND, summed(dgate), dy_BND


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, heads: int) -> Tensor:
        parts = [part.contiguous() for part in (q_BTD, k_BTD, v_BTD)]
        batch, tokens, width = q_BTD.shape
        o_BTD, sizes = torch.empty_like(parts[0]), (batch, tokens, heads, width // heads)
        kept = any(ctx.needs_input_grad)
        shares = q_BTD.new_empty(batch, heads, tokens, tokens) if kept else None
        call("attention", o_BTD, *parts, shares, o_BTD, *_for_attention(o_BTD, sizes, back=False))
        if kept:
            ctx.save_for_backward(*parts, shares)
        ctx.sizes = sizes
        return o_BTD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, do_BTD: Tensor) -> tuple[Tensor | None, ...]:
        *parts, shares = ctx.saved_tensors
        found = [torch.empty_like(part) for part in parts]
        last = _for_attention(do_BTD, ctx.sizes, back=True)
        call("attention_back", do_BTD, *parts, shares, do_BTD.contiguous(), *found, *last)
        return *found, None


def _for_attention(
    like: Tensor, sizes: tuple[int, int, int, int], *, back: bool
) -> tuple[Tensor | int | float, ...]:
    """What the kernels of attention are given last: scratch of each thread, the sizes and the scale."""
    _, tokens, _, features = sizes
    bytes_each = call("attention_scratch", like, tokens, features, int(back))
    scratch = like.new_empty(bytes_each * torch.get_num_threads(), dtype=torch.uint8)
    return scratch, *sizes, features**-0.5


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        call("gelu", x, x, y, x.numel())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        call("gelu_back", x, x, dy, dx, x.numel())
        return dx


def _conditions(a_BD: Tensor, b_BD: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    """Two of a sample's vectors, such as parts of one tensor: with one distance between the rows of both. One row may
    be everyone's."""
    a_BD, b_BD = a_BD.expand(batch, -1), b_BD.expand(batch, -1)
    if a_BD.stride() != b_BD.stride() or a_BD.stride(1) != 1:
        a_BD, b_BD = a_BD.contiguous(), b_BD.contiguous()
    return a_BD, b_BD, a_BD.stride(0)
