"""The passes of component matrices, forward and backward: what product.py's factors are multiplied with.

The backward pass adds where automatic differentiation would copy.

B batch, T tokens, I/O features in/out, R learngene components, M tailor components of a sample, J components of a whole
bank, S slots, K slots per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kindiff import native
from kindiff.components import narrow


class Products(torch.autograd.Function):
    """y_i = h_i U_i + b_i with h = x V^T, and (x v^T) u_i on top where there are v and u_i of tailors' own.

    Those are each sample's (B, M, I) and (B, M, O), or a bank's (J, I) and (J, O) with a mask: a sample's columns of
    the products with V are multiplied by its mask, so that the others' tailors give nothing. A mask without v is for a
    bank that stands in the last J rows of each U_i and of each layer's part of V.

    Each sample's own may be the first samples' alone: the others have none. Which gradients are computed is decided
    for the u, v, biases and tailors of all layers together.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, v: Tensor, mask_B1J: Tensor | None, v_own: Tensor | None, *factors: Any
    ) -> tuple[Tensor, ...]:
        count = len(factors) // (2 if v_own is None else 3)
        us, biases, own = factors[:count], factors[count : 2 * count], factors[2 * count :]
        ys, h, h_own = _forward(x_BTI, us, v, biases, own, v_own, mask_B1J)
        needs, ctx.count = ctx.needs_input_grad, count
        ctx.needs = _Needs(
            needs[0], any(needs[4 : 4 + count]), needs[1], any(needs[4 + count : 4 + 2 * count]),
            any(needs[4 + 2 * count :]), needs[3],
        )  # fmt: skip
        ctx.save_for_backward(*_kept(ctx.needs, x_BTI, h, h_own), v, v_own, mask_B1J, *us, *own)
        return tuple(ys)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, h, h_own, v, v_own, mask_B1J, *factors = ctx.saved_tensors
        us, own = factors[: ctx.count], factors[ctx.count :]
        dx, du, dv, db, du_own, dv_own = _backward(
            dys_BTO, ctx.needs, x_BTI, h, h_own, us, v, own, v_own, mask_B1J
        )
        return dx, _like(dv, v), None, dv_own, *map(_like, du, us), *db, *du_own


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(tensor.dtype)


class Gathered(torch.autograd.Function):
    """The same of layers' own parameters, in training on a CPU: a pass is one kernel, which scales, rounds and gathers
    the factors too. With gelu: GELU of the one layer's y.

    Which gradients are computed is decided for learngenes, biases and tailors of all layers together. There is no
    second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, slots_BK: Tensor, weights_BK: Tensor, gelu: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        x_BTI, slots_BK, weights_BK = x_BTI.contiguous(), slots_BK.contiguous(), weights_BK.contiguous()
        ys, active, h, h_own = native.layers_forward(x_BTI, slots_BK, weights_BK, parameters, gelu=gelu)
        count = len(ys)
        needs = [any(ctx.needs_input_grad[4 + i * count : 4 + (i + 1) * count]) for i in range(7)]
        ctx.needs = {"common": any(needs[:3]), "biases": needs[3], "own": any(needs[4:])}
        before = ys[0] if gelu else None
        ctx.save_for_backward(before, x_BTI, h, h_own, slots_BK, weights_BK, *parameters)
        return tuple(ys) if active is None else (active,)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys_BTO: Tensor) -> tuple[Tensor | None, ...]:
        before, x_BTI, h, h_own, slots_BK, weights_BK, *parameters = ctx.saved_tensors
        dx, found = native.layers_backward(
            dys_BTO, x_BTI, h, h_own, slots_BK, weights_BK, parameters,
            before_gelu=before, inner=ctx.needs_input_grad[0], **ctx.needs,
        )  # fmt: skip
        return dx, None, None, None, *found


class _Needs(NamedTuple):
    """Which gradients are asked for: of x, the learngenes' u and v, the biases, the tailors' u and v."""

    x: bool
    u: bool
    v: bool
    biases: bool
    u_own: bool
    v_own: bool


def _kept(
    needs: _Needs, x: Tensor, h: Tensor, h_own: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x and the products with V what the backward pass reads."""
    return x if needs.v or needs.v_own else None, h if needs.u else None, h_own if needs.u_own else None


def _forward(
    x_BTI: Tensor,
    us: Sequence[Tensor],
    v: Tensor,
    biases: Sequence[Tensor | None],
    own: Sequence[Tensor],
    v_own: Any,
    mask_B1J: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The y of each layer, h and x v^T."""
    count, x = len(us), _rows(x_BTI)
    h = narrow.common(x, v.T)
    h_own: Any = None
    parts = h.split([len(u) for u in us], dim=1)
    each = v_own is not None and v_own.ndim == 3
    if v_own is not None:
        h_own = narrow.inward(x_BTI, v_own) if each else x @ v_own.T
    own_parts = () if h_own is None else h_own.chunk(count, dim=-1)
    if mask_B1J is not None:
        _mask_(own_parts or parts, mask_B1J)
    ys = []
    for i, (part, u, bias) in enumerate(zip(parts, us, biases, strict=True)):
        mine = (own_parts[i], own[i]) if own_parts else ()
        y_BTO = narrow.outward(part, u, bias, len(x_BTI), *(mine if each else ()))
        if mine and not each:
            _rows(y_BTO).addmm_(*mine)
        ys.append(y_BTO)
    return ys, h, h_own


def _backward(
    dys_BTO: Sequence[Tensor],
    needs: _Needs,
    x_BTI: Any,
    h: Any,
    h_own: Any,
    us: Sequence[Tensor],
    v: Tensor,
    own: Sequence[Tensor],
    v_own: Any,
    mask_B1J: Any,
) -> tuple[Any, ...]:
    """Gradients of x, the u, v, the biases, the tailors' u and v; None where they are not asked for.

    Those of the u and v may be in fp32.
    """
    count, batch, dys = len(us), len(dys_BTO[0]), [_rows(dy) for dy in dys_BTO]
    each = v_own is not None and v_own.ndim == 3
    x: Any = None if x_BTI is None else _rows(x_BTI)
    mine = [None] * count if h_own is None else h_own.chunk(count, dim=-1)
    dx = dv = dv_own = dh_own = None
    du: list[Tensor | None] = [None] * count
    db: list[Tensor | None] = [dy.sum(dim=0) if needs.biases and not each else None for dy in dys]
    du_own: list[Tensor | None] = [None] * len(own)
    if each:
        found = [
            narrow.backward(dy, u, h_i, du=needs.u_own, bias=needs.biases)
            for dy, u, h_i in zip(dys_BTO, own, mine, strict=True)
        ]
        dh_own = stack([dh for dh, _, _ in found], dim=-1)
        du_own, db = [du for _, du, _ in found], [total for _, _, total in found]
        dv_own = narrow.gathered(dh_own, x_BTI) if needs.v_own else None
    elif v_own is not None:
        parts = [dy @ u.T for dy, u in zip(dys, own, strict=True)]
        _mask_(parts, mask_B1J)
        dh_own = stack(parts, dim=1)
        dv_own = dh_own.T @ x if needs.v_own else None
        du_own = [h_i.T @ dy if needs.u_own else None for h_i, dy in zip(mine, dys, strict=True)]
    if needs.x or needs.v:
        each_dh, dh = narrow.joined(dys, [u.T for u in us])
        if mask_B1J is not None and v_own is None:
            _mask_(each_dh, mask_B1J)
        dh = stack(each_dh, dim=1) if dh is None else dh
        if needs.v:
            dv = narrow.turned(dh, x)
        if needs.x:
            dx = narrow.outward(dh, v, None, batch, *((dh_own, v_own) if each else ()))
            if dh_own is not None and not each:
                _rows(dx).addmm_(dh_own, v_own)
    if needs.u:
        pieces = h.split([len(u) for u in us], dim=1)
        du = [narrow.turned(part, dy) for part, dy in zip(pieces, dys, strict=True)]
    return dx, du, dv, db, du_own, dv_own


def _rows(x_BTI: Tensor) -> Tensor:
    return x_BTI.reshape(-1, x_BTI.shape[2])


def _mask_(parts: Sequence[Tensor], mask_B1J: Tensor) -> None:
    """Multiply the last J columns of each part by each sample's mask, in place."""
    batch, _, columns = mask_B1J.shape
    for part in parts:
        part.unflatten(0, (batch, -1))[..., -columns:].mul_(mask_B1J)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One tensor of several, without a copy where there is one only."""
    return torch.cat(list(tensors), dim=dim) if len(tensors) > 1 else tensors[0]
