"""Component matrices with each sample's own tailors in the same pass, on a GPU: two kernels (Triton).

On a GPU thin products wait for memory, not for arithmetic. Tailors as products of their own read every input once more
and write every output twice, which costs more than the learngenes. Here a sample's few tailor components ride in the
learngenes' tiles: one kernel for products with a transposed factor (h = x V^T, dh = dy U^T), one for h U and dh V, and
one for the gradients of all factors (h^T dy, dh^T x) that share a side.

B batch, T tokens, I/O features in/out, L layers that share an input, R learngene components of each, M tailor
components of a sample in each, F columns that those fill (M up to the next of 16, 32, 64: after M a column of ones,
whose gradient is the bias's, then zeros).
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
INWARD_TILE = {"BLOCK_T": 128, "BLOCK_R": 256, "BLOCK_I": 64, "num_warps": 8, "num_stages": 4}
OUTWARD_TILE = {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}
WEIGHTS_TILE = {"BLOCK_R": 256, "BLOCK_O": 128, "BLOCK_T": 64, "num_warps": 8, "num_stages": 3}
"""Rows, columns and inner numbers of a block; chosen on an H200 (`python benchmarks/fused.py tiles`)."""
PROGRAMS = 132
"""Programs of `weights`: as many as run at once on such a card, one a multiprocessor."""
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
            if needs[1] and needs[2]:
                dv, own_rows = _factors(dh, x_BTI, v, count, 0, count)
                dv_own = own_rows[:, :, : v_own.shape[1] // count].flatten(1, 2)
            elif needs[1]:
                dv = dh[:, : len(v)].T @ x_BTI.flatten(0, 1)
            elif needs[2]:
                dv_own = _own_gradient(dh[:, len(v) :], x_BTI, v_own.shape[1], count)
        need_u, need_b, need_own = (needs[3 + i * count : 3 + (i + 1) * count] for i in range(3))
        du: list[Tensor | None] = [None] * count
        db: list[Tensor | None] = [None] * count
        du_own: list[Tensor | None] = [None] * count
        for i, dy in enumerate(dys):
            mine = own[i].shape[1]
            if h is None:
                pass
            elif need_u[i] and need_own[i]:
                du[i], own_rows = _factors(h, dy, us[i], count, i, 1)
                du_own[i] = own_rows[:, 0, :mine]
                if need_b[i] and mine < own_rows.shape[2]:  # the column of ones has summed up dy
                    db[i] = own_rows[:, 0, mine].sum(dim=0)
            elif need_u[i]:
                du[i] = h[:, i * rank : (i + 1) * rank].T @ dy.flatten(0, 1)
            elif need_own[i]:
                few = (h.shape[1] - len(v)) // count
                part = h[:, len(v) + i * few : len(v) + (i + 1) * few]
                du_own[i] = _own_gradient(part, dy, mine, 1)
            if need_b[i] and db[i] is None:
                db[i] = dy.sum(dim=(0, 1))
        return dx, dv, dv_own, *du, *db, *du_own


def _factors(
    h: Tensor, z_BTO: Tensor, like: Tensor, layers: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Gradients of learngenes (count R, O) and, of each sample, (B, count, F, O): columns of h against rows of z."""
    rank = len(like) // count
    parts, own = weights(h, z_BTO, layers * rank, layers, first, count)
    return parts.sum(dim=0).to(like.dtype), own


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
    tile = _for_rank(INWARD_TILE, rank)
    grid = (batch * _parts(tokens, tile["BLOCK_T"]) * count * _parts(rank, tile["BLOCK_R"]),)
    for i, (x, v, own) in enumerate(zip(xs, vs, owns, strict=True)):
        launch[grid](
            x, v, own.contiguous(), h, tokens, width, rank, mine, count, h.shape[1], i * count * rank,
            layers * rank + i * count * few, FEW=few, **tile,
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


@_op("kindiff::weights", mutates_args=())
def weights(h: Tensor, z: Tensor, own_at: int, layers: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Of `count` of the layers of h, the first at `first`, against z (B, T, O), summed over rows.

    For the learngenes in parts to be added up, (P, count R, O) fp32; for each sample's own, (B, count, F, O).
    """
    launch = _kernel("weights")
    samples, tokens, features = z.shape
    rank, few = own_at // layers, (h.shape[1] - own_at) // layers
    found, own = _weights_out(h, z, own_at, layers, count)
    parts, tile = len(found), _for_rank(WEIGHTS_TILE, rank)
    launch[(parts * _weights_tiles(rank, features, count),)](
        h, z, found, own, samples, tokens, features, rank, count, _parts(samples, parts), h.shape[1], first * rank,
        own_at + first * few, FEW=few, **tile,
    )  # fmt: skip
    return found, own


@weights.register_fake
def _(h: Tensor, z: Tensor, own_at: int, layers: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    return _weights_out(h, z, own_at, layers, count)


def _weights_out(h: Tensor, z: Tensor, own_at: int, layers: int, count: int) -> tuple[Tensor, Tensor]:
    samples, _, features = z.shape
    rank, few = own_at // layers, (h.shape[1] - own_at) // layers
    parts = min(samples, max(1, PROGRAMS // _weights_tiles(rank, features, count)))
    parts = _parts(samples, _parts(samples, parts))  # each with a sample at least
    return (
        h.new_empty(parts, count * rank, features, dtype=torch.float32),
        h.new_empty(samples, count, few, features),
    )


def _weights_tiles(rank: int, features: int, count: int) -> int:
    tile = _for_rank(WEIGHTS_TILE, rank)
    return count * _parts(rank, tile["BLOCK_R"]) * _parts(features, tile["BLOCK_O"])


def _for_rank(tile: dict[str, int], rank: int) -> dict[str, int]:
    """A block no wider than the rank needs."""
    return tile | {"BLOCK_R": min(tile["BLOCK_R"], max(64, 1 << (rank - 1).bit_length()))}


def _kernel(name: str) -> Any:
    from kindiff.components import kernels

    kernel = getattr(kernels, name)
    return library.wrap_triton(kernel) if _GPU else kernel


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)
