"""What component matrices compute, forward and backward, written once for all of them.

The plain reference is `ComponentLinear.merged_weight`: one dense matrix for each sample. Here nothing of that size is
formed, and the backward pass adds where automatic differentiation would copy.

B batch, T tokens, I/O features in/out, R learngene components, M tailor components of a sample, S slots, N components
of a slot, K slots per sample, J = S N components of a whole bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kindiff.components.strategy import strategy_of
from kindiff.models.layers import Gating

if TYPE_CHECKING:
    from kindiff.components.linear import ComponentLinear


def products(layers: Sequence[ComponentLinear], x_BTI: Tensor, gating: Gating | None) -> list[Tensor]:
    """y (B, T, O) of each of some factored layers that share their input (q, k, v), in the input's dtype.

    One product serves the V sides of all. sigma and the gate's weights scale U in fp32, before any rounding.
    All layers have tailors or none has; `kindiff.components.strategy` says how those are computed.
    """
    dtype = x_BTI.dtype
    us = [layer.u * layer.sigma.unsqueeze(1) for layer in layers]
    vs = [layer.v for layer in layers]
    biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]
    mask_B1J = v_BMI = None
    own: list[Tensor] = []
    if layers[0].has_tailors:
        assert gating is not None, "a layer with tailors needs a gate"
        if strategy_of(layers[0], gating, dtype).name == "joined":
            mask_B1J = _columns(layers[0], gating).unsqueeze(1).to(dtype)
            banks = [layer.tailor_u * layer.tailor_sigma.unsqueeze(2) for layer in layers]
            us = [torch.cat([u, bank.flatten(0, 1)]) for u, bank in zip(us, banks, strict=True)]
            vs = [v for layer in layers for v in (layer.v, layer.tailor_v.flatten(0, 1))]
        else:
            gathered = [_gather(layer, gating, dtype) for layer in layers]
            v_BMI = torch.cat([v for _, v in gathered], dim=1) if len(layers) > 1 else gathered[0][1]
            own = [u for u, _ in gathered]
    v_RI = torch.cat(vs) if len(vs) > 1 else vs[0]
    us = [u.to(dtype) for u in us]
    return list(_Products.apply(x_BTI, v_RI.to(dtype), mask_B1J, v_BMI, *us, *biases, *own))


def add_tailors(layer: ComponentLinear, y_BTO: Tensor, x_BTI: Tensor, gating: Gating) -> Tensor:
    """y plus each sample's tailors: for learngenes that are one dense weight."""
    u_BMO, v_BMI = _gather(layer, gating, x_BTI.dtype)
    return torch.baddbmm(y_BTO, torch.bmm(x_BTI, v_BMI.transpose(1, 2)), u_BMO)


def _gather(layer: ComponentLinear, gating: Gating, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each sample's own tailors: u (B, M, O), scaled by sigma and the gate, and v (B, M, I)."""
    slots_BK, weights_BK = gating
    scale_BKN = layer.tailor_sigma[slots_BK] * weights_BK.unsqueeze(2)
    u_BMO = (layer.tailor_u[slots_BK] * scale_BKN.unsqueeze(3)).flatten(1, 2)
    return u_BMO.to(dtype), layer.tailor_v[slots_BK].flatten(1, 2).to(dtype)


def _columns(layer: ComponentLinear, gating: Gating) -> Tensor:
    """(B, J): how much of each component of the bank each sample has."""
    slots, count = layer.tailor_sigma.shape
    weights_BS = gating.weights_BK.new_zeros(len(gating.slots_BK), slots)
    return weights_BS.scatter_add(1, gating.slots_BK, gating.weights_BK).repeat_interleave(count, dim=1)


class _Products(torch.autograd.Function):
    """y_i = h_i U_i + b_i with h = x V^T, and for a sample's own tailors (x v^T) u_i on top.

    With a mask the last J rows of each U_i, and of each layer's part of V, are the bank: a sample's columns of h
    are multiplied by its mask, so that the others' tailors give nothing. Only the gradients that are asked for are
    computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, v: Tensor, mask_B1J: Tensor | None, v_BMI: Tensor | None, *factors: Any
    ) -> tuple[Tensor, ...]:
        count = len(factors) // (2 if v_BMI is None else 3)
        us, biases, own = factors[:count], factors[count : 2 * count], factors[2 * count :]
        batch, tokens, _ = x_BTI.shape
        x = x_BTI.reshape(batch * tokens, -1)
        h = x @ v.T
        parts = h.split([len(u) for u in us], dim=1)
        if mask_B1J is not None:
            _mask_(parts, mask_B1J)
        ys = tuple(
            (part @ u if bias is None else torch.addmm(bias, part, u)).view(batch, tokens, -1)
            for bias, part, u in zip(biases, parts, us, strict=True)
        )
        h_BTM = None
        if v_BMI is not None:
            h_BTM = torch.bmm(x_BTI, v_BMI.transpose(1, 2))
            for y_BTO, part_BTM, u_BMO in zip(
                ys, h_BTM.split([u.shape[1] for u in own], dim=2), own, strict=True
            ):
                y_BTO.baddbmm_(part_BTM, u_BMO)
        learn_u = any(ctx.needs_input_grad[4 : 4 + count])
        keep_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.count, ctx.batch = count, batch
        ctx.save_for_backward(x if keep_x else None, h if learn_u else None, v, mask_B1J, v_BMI, h_BTM, *us, *own)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, h, v, mask_B1J, v_BMI, h_BTM, *factors = ctx.saved_tensors
        us, own = factors[: ctx.count], factors[ctx.count :]
        batch, needs = ctx.batch, ctx.needs_input_grad
        need_u, need_b = needs[4 : 4 + ctx.count], needs[4 + ctx.count : 4 + 2 * ctx.count]
        sizes = [len(u) for u in us]
        flat = [dy.reshape(-1, dy.shape[2]) for dy in dys]
        dx = dv = dv_BMI = None
        if needs[0] or needs[1]:
            parts = [dy @ u.T for dy, u in zip(flat, us, strict=True)]
            if mask_B1J is not None:
                _mask_(parts, mask_B1J)
            dh = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            if needs[0]:
                dx = (dh @ v).view(batch, -1, v.shape[1])
            if needs[1]:
                dv = dh.T @ x
        du_own: list[Tensor] = []
        if v_BMI is not None:
            narrow = [torch.bmm(dy, u.transpose(1, 2)) for dy, u in zip(dys, own, strict=True)]
            dh_BTM = torch.cat(narrow, dim=2) if len(narrow) > 1 else narrow[0]
            if dx is not None:
                dx.baddbmm_(dh_BTM, v_BMI)
            if needs[3]:
                dv_BMI = torch.bmm(dh_BTM.transpose(1, 2), x.view(batch, -1, x.shape[1]))
            if needs[-1]:
                parts_BTM = h_BTM.split([u.shape[1] for u in own], dim=2)
                du_own = [torch.bmm(p.transpose(1, 2), dy) for p, dy in zip(parts_BTM, dys, strict=True)]
            else:
                du_own = [None] * len(own)  # type: ignore[list-item]
        pieces = h.split(sizes, dim=1) if h is not None else [None] * ctx.count
        du = [p.T @ dy if need else None for need, p, dy in zip(need_u, pieces, flat, strict=True)]
        db = [dy.sum(dim=0) if need else None for need, dy in zip(need_b, flat, strict=True)]
        return dx, dv, None, dv_BMI, *du, *db, *du_own


def _mask_(parts: Sequence[Tensor], mask_B1J: Tensor) -> None:
    """Multiply the last J columns of each part by each sample's mask, in place."""
    batch, _, columns = mask_B1J.shape
    for part in parts:
        part.unflatten(0, (batch, -1))[..., -columns:].mul_(mask_B1J)
