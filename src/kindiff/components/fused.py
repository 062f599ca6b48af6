"""Component matrices with each sample's own tailors in the same pass, on a GPU: kernels of our own (Triton).

On a GPU thin products wait for memory, not for arithmetic. Tailors as products of their own read every input once more
and write every output twice, which costs more than the learngenes. Here a sample's few tailor components ride in the
learngenes' tiles, and a block of rows goes through both factors while it is on the chip: y = (x V^T) U, and backward
dx = (dy U^T) V, are one kernel. One more computes the gradients of all factors that share a side (h^T dy, dh^T x); dx
of layers that share an input, and ranks above WHOLE, take two kernels, one for each factor.

B batch, T tokens, I/O features in/out, L layers that share an input, R learngene components of each, M tailor
components of a sample in each, F columns that those fill (M up to the next of 16, 32, 64: after M a column of ones,
whose gradient is the bias's, then zeros).
h is (B T, L R + L F): the learngenes' columns layer by layer, then the tailors'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kindiff.components.operators import FEW, ROWS, TRITON, inward, outward, through, weights


def fits(rank: int | None, components: int, dtype: torch.dtype) -> bool:
    """Whether the kernels can compute a layer of this learngene rank and this many tailor components a sample."""
    return (
        TRITON
        and rank is not None
        and rank % ROWS == 0
        and 0 < components <= FEW[-1]
        and dtype in (torch.bfloat16, torch.float16)
    )


class FusedProducts(torch.autograd.Function):
    """y_i = x (V_i^T U_i + v_i(b)^T u_i(b)) + b_i for each layer i and the sample b that a row belongs to.

    Inputs: x (B, T, I), v (L R, I), v_own (B, L M, I), u (L R, O), bias (L, O) or None, u_own (B, L M, O), and L. Only
    the gradients that are asked for are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        v: Tensor,
        v_own: Tensor,
        u: Tensor,
        bias: Tensor | None,
        u_own: Tensor,
        layers: int,
    ) -> tuple[Tensor, ...]:
        x_BTI, v_own, u_own = x_BTI.contiguous(), v_own.contiguous(), u_own.contiguous()
        _, need_v, need_v_own, need_u, _, need_u_own, _ = ctx.needs_input_grad
        keep_x, keep_h = need_v or need_v_own, need_u or need_u_own
        y_LBTO, h = through(x_BTI, v, v_own, u, u_own, bias, layers, keep_h)
        ctx.layers = layers
        ctx.save_for_backward(x_BTI if keep_x else None, h if keep_h else None, v, v_own, u, u_own)
        return y_LBTO.unbind()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, h, v, v_own, u, u_own = ctx.saved_tensors
        layers: int = ctx.layers
        need_x, need_v, need_v_own, need_u, need_bias, need_u_own, _ = ctx.needs_input_grad
        dys = [dy.contiguous() for dy in dys_BTO]
        dx = dv = dv_own = du = db = du_own = None
        if need_x and layers == 1:
            dx_1BTI, dh = through(dys[0], u, u_own, v, v_own, None, 1, need_v or need_v_own)
            dx = dx_1BTI[0]
        elif need_x or need_v or need_v_own:
            dh = inward(dys, u, u_own)
            dx = outward(dh, v, v_own, layers) if need_x else None
        mine = v_own.shape[1] // layers
        if need_v or need_v_own:
            dv, rows = _factors(dh, x_BTI, v, layers, 0, layers, need_v, need_v_own)
            dv_own = None if rows is None else rows[:, :, :mine].flatten(1, 2)
        if need_u or need_u_own:
            found = [_factors(h, dy, u, layers, i, 1, need_u, need_u_own) for i, dy in enumerate(dys)]
            if need_u:
                du = torch.cat([part for part, _ in found])  # type: ignore[misc]
            if need_u_own:
                rows = torch.cat([row for _, row in found], dim=1)  # type: ignore[misc]
                du_own = rows[:, :, :mine].flatten(1, 2)
                if need_bias and mine < rows.shape[2]:  # the column of ones has summed up dy
                    db = rows[:, :, mine].sum(dim=0)
        if need_bias and db is None:
            db = torch.stack([dy.sum(dim=(0, 1)) for dy in dys])
        return dx, dv, dv_own, du, db, du_own, None


def _factors(
    h: Tensor, z_BTO: Tensor, like: Tensor, layers: int, first: int, count: int, common: bool, own: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of learngenes (count R, O) and, of each sample, (B, count, F, O): columns of h against rows of z."""
    rank = len(like) // layers
    if common and own:
        parts, rows = weights(h, z_BTO, rank, layers, first, count)
        return parts.sum(dim=0).to(like.dtype), rows
    if common:
        return h[:, first * rank : (first + count) * rank].T @ z_BTO.flatten(0, 1), None
    few = h.shape[1] // layers - rank
    part = h[:, layers * rank + first * few :][:, : count * few]
    return None, (part.unflatten(0, z_BTO.shape[:2]).mT @ z_BTO).unflatten(1, (count, few))
