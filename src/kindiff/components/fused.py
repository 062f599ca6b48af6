"""Component matrices with each sample's own tailors in the same pass, on a GPU: two kernels (Triton).

On a GPU thin products wait for memory, not for arithmetic. Tailors as products of their own read every input once more
and write every output twice, which costs more than the learngenes. Here a sample's few tailor components ride in the
learngenes' tiles: one kernel for products with a transposed factor (h = x V^T, dh = dy U^T) and one for h U and dh V.

B batch, T tokens, I/O features in/out, L layers that share an input, R learngene components of each, M tailor
components of a sample in each, F columns that those fill (M up to the next of 16, 32, 64; zeros after M).
h is (B T, L R + L F): the learngenes' columns layer by layer, then the tailors'.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

FEW = (16, 32, 64)
"""Columns that a sample's tailors may fill in a tile."""
ROWS = 16
"""Learngene ranks are multiples of this."""
TRITON = importlib.util.find_spec("triton") is not None
"""Torch brings it along wherever it can run on a GPU."""
INWARD_TILE = {"BLOCK_T": 128, "BLOCK_R": 256, "BLOCK_I": 64, "num_warps": 8, "num_stages": 3}
OUTWARD_TILE = {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}
"""Rows, columns and inner numbers of a block; chosen on an H100 (`python benchmarks/fused.py tiles`)."""
# Compiled programs launch a triton_op's kernels themselves; Triton's interpreter needs a call that is not looked into.
_GPU = torch.cuda.is_available()
_op = library.triton_op if _GPU else library.custom_op


def fits(rank: int | None, components: int, dtype: torch.dtype) -> bool:
    """Whether the kernels can compute a layer of this learngene rank and this many tailor components a sample."""
    return (
        TRITON
        and rank is not None
        and rank % ROWS == 0
        and 0 < components <= FEW[-1]
        and dtype in (torch.bfloat16, torch.float16)
    )


def columns_of(components: int) -> int:
    """F: the columns that M components fill."""
    return next(few for few in FEW if components <= few)


class FusedProducts(torch.autograd.Function):
    """y_i = x (V_i^T U_i + v_i(b)^T u_i(b)) + b_i for each layer i and the sample b that a row belongs to.

    Inputs: x (B, T, I), v (L R, I), v_own (B, L M, I), then L each of u (R, O), bias (O) or None, u_own (B, M, O).
    Only the gradients that are asked for are computed.
    """

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, v: Tensor, v_own: Tensor, *factors: Any) -> tuple[Tensor, ...]:
        count = len(factors) // 3
        us, biases, own = factors[:count], factors[count : 2 * count], factors[2 * count :]
        x_BTI = x_BTI.contiguous()
        h = inward([x_BTI], [v], [v_own], count)
        ys = [outward(h, us[i], own[i], biases[i], len(v), count, i, 1) for i in range(count)]
        needs = ctx.needs_input_grad
        keep_h = any(needs[3 : 3 + count]) or any(needs[3 + 2 * count :])
        ctx.count = count
        ctx.save_for_backward(
            x_BTI if needs[1] or needs[2] else None, h if keep_h else None, v, v_own, *us, *own
        )
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, h, v, v_own, *factors = ctx.saved_tensors
        count, needs = ctx.count, ctx.needs_input_grad
        us, own = factors[:count], factors[count:]
        dys = [dy.contiguous() for dy in dys_BTO]
        rank = len(v) // count
        dx = dv = dv_own = None
        if any(needs[:3]):
            dh = inward(dys, us, own, 1)
            if needs[0]:
                dx = outward(dh, v, v_own, None, len(v), count, 0, count)
            if needs[1]:
                dv = dh[:, : len(v)].T @ x_BTI.flatten(0, 1)
            if needs[2]:
                dv_own = _own_gradient(dh[:, len(v) :], x_BTI, v_own.shape[1], count)
        need_u, need_b, need_own = (needs[3 + i * count : 3 + (i + 1) * count] for i in range(3))
        du: list[Tensor | None] = [None] * count
        du_own: list[Tensor | None] = [None] * count
        if h is not None:
            few = (h.shape[1] - len(v)) // count
            for i, dy in enumerate(dys):
                if need_u[i]:
                    du[i] = h[:, i * rank : (i + 1) * rank].T @ dy.flatten(0, 1)
                if need_own[i]:
                    part = h[:, len(v) + i * few : len(v) + (i + 1) * few]
                    du_own[i] = _own_gradient(part, dy, own[i].shape[1], 1)
        db = [dy.sum(dim=(0, 1)) if need else None for need, dy in zip(need_b, dys, strict=True)]
        return dx, dv, dv_own, *du, *db, *du_own


def _own_gradient(h: Tensor, x_BTI: Tensor, components: int, count: int) -> Tensor:
    """(B, L M, I): each sample's own columns of h against its own rows of x."""
    batch, tokens, _ = x_BTI.shape
    found = h.unflatten(0, (batch, tokens)).mT @ x_BTI
    few = found.shape[1] // count
    return found.unflatten(1, (count, few))[:, :, : components // count].flatten(1, 2)


@_op("kindiff::inward", mutates_args=())
def inward(xs: Sequence[Tensor], vs: Sequence[Tensor], owns: Sequence[Tensor], count: int) -> Tensor:
    """h (B T, L R + L F) of inputs (B, T, I), each with factors (count R, I) and own ones (B, count M, I)."""
    launch = _kernel("inward")
    batch, tokens, width = xs[0].shape
    layers, rank, mine = len(xs) * count, len(vs[0]) // count, owns[0].shape[1] // count
    few = columns_of(mine)
    h = xs[0].new_empty(batch * tokens, layers * (rank + few))
    grid = (batch * _parts(tokens, INWARD_TILE["BLOCK_T"]) * count * _parts(rank, INWARD_TILE["BLOCK_R"]),)
    for i, (x, v, own) in enumerate(zip(xs, vs, owns, strict=True)):
        launch[grid](
            x, v, own.contiguous(), h, tokens, width, rank, mine, count, h.shape[1], i * count * rank,
            layers * rank + i * count * few, FEW=few, **INWARD_TILE,
        )  # fmt: skip
    return h


@inward.register_fake
def _(xs: Sequence[Tensor], vs: Sequence[Tensor], owns: Sequence[Tensor], count: int) -> Tensor:
    batch, tokens, _ = xs[0].shape
    few = columns_of(owns[0].shape[1] // count)
    return xs[0].new_empty(batch * tokens, len(xs) * (len(vs[0]) + count * few))


@_op("kindiff::outward", mutates_args=())
def outward(
    h: Tensor, u: Tensor, own: Tensor, bias: Tensor | None, own_at: int, layers: int, first: int, count: int
) -> Tensor:
    """y (B, T, O) from `count` of the layers of h, the first at `first`: factors (count R, O), own (B, count M, O)."""
    launch = _kernel("outward")
    batch, mine = len(own), own.shape[1] // count
    rows, features = len(h), u.shape[1]
    tokens, few = rows // batch, (h.shape[1] - own_at) // layers
    y = h.new_empty(batch, tokens, features)
    grid = (batch * _parts(tokens, OUTWARD_TILE["BLOCK_T"]) * _parts(features, OUTWARD_TILE["BLOCK_O"]),)
    launch[grid](
        h, u, own.contiguous(), y if bias is None else bias, y, tokens, features, len(u), mine, count, h.shape[1],
        first * (own_at // layers), own_at + first * few, FEW=few, BIAS=bias is not None, **OUTWARD_TILE,
    )  # fmt: skip
    return y


@outward.register_fake
def _(
    h: Tensor, u: Tensor, own: Tensor, bias: Tensor | None, own_at: int, layers: int, first: int, count: int
) -> Tensor:
    return h.new_empty(len(own), len(h) // len(own), u.shape[1])


def _kernel(name: str) -> Any:
    from kindiff.components import kernels

    kernel = getattr(kernels, name)
    return library.wrap_triton(kernel) if _GPU else kernel


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)
