"""What component matrices compute, forward and backward, written once for all of them.

The plain reference is `ComponentLinear.merged_weight`: one dense matrix for each sample. Here nothing of that size is
formed, and the backward pass adds where automatic differentiation would copy.

B batch, T tokens, I/O features in/out, R learngene components, M tailor components of a sample, S slots, N components
of a slot, K slots per sample, J = S N components of a whole bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kindiff.components.fused import FusedProducts
from kindiff.components.strategy import strategy_of
from kindiff.models.layers import Gating

if TYPE_CHECKING:
    from kindiff.components.linear import ComponentLinear


Made = TypeVar("Made")
KEPT = 2**22
"""Numbers of a batch's own tailors, in one matrix, up to which a sampler's steps share them: of more, gathering them is
little of a step, and memory counts."""


def products(layers: Sequence[ComponentLinear], x_BTI: Tensor, gating: Gating | None) -> list[Tensor]:
    """y (B, T, O) of each of some factored layers that share their input (q, k, v), in the input's dtype.

    One product serves the V sides of all. sigma and the gate's weights scale U in fp32, before any rounding.
    All layers have tailors or none has; `kindiff.components.strategy` says how those are computed.
    """
    first, dtype = layers[0], x_BTI.dtype
    assert gating is not None or not first.has_tailors, "a layer with tailors needs a gate"
    if not first.has_tailors or gating is None or gating.on == 0:
        us, v, biases = _common(layers, gating, dtype)
        return list(_Products.apply(x_BTI, v, None, None, *us, *biases))
    how = strategy_of(layers, gating, dtype).name
    if first.tailor_mix is not None:
        return [_mixed(layer, x_BTI, gating, joined=how == "joined") for layer in layers]
    if how == "joined":
        return list(_Products.apply(x_BTI, *_joined(layers, gating, dtype)))
    us, v, biases = _common(layers, gating, dtype)
    if how == "fused":
        own, v_own = _own(layers, gating, dtype)
        rows = [bias.unsqueeze(0) for bias in biases if bias is not None]  # all layers have one, or none
        bias = _stack(rows) if rows else None
        return list(FusedProducts.apply(x_BTI, v, v_own, _stack(us), bias, _stack(own, dim=1), len(layers)))
    own, v_own = _own(layers, _first(gating), dtype, biases)
    return list(_Products.apply(x_BTI, v, None, v_own, *us, *(None for _ in us), *own))


def _common(
    layers: Sequence[ComponentLinear], gating: Gating | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """Of the learngenes: each layer's u, scaled by sigma; the v of all; each layer's bias."""

    def make() -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        us = [(layer.u * layer.sigma.unsqueeze(1)).to(dtype) for layer in layers]
        return us, _stack([layer.v for layer in layers]).to(dtype), _biases(layers, dtype)

    rounded = dtype != layers[0].u.dtype  # else little is saved, for as much memory as the model's
    return _once(gating, (layers[0], "learngenes"), make, keep=rounded)


def _own(
    layers: Sequence[ComponentLinear],
    gating: Gating,
    dtype: torch.dtype,
    biases: Sequence[Tensor | None] = (),
) -> tuple[list[Tensor], Tensor]:
    """Of each sample's own tailors: each layer's u (B, M, O), scaled by sigma and the gate, and v (B, M, I) of all.
    Where there are biases, each stands below its layer's u: (B, M + 1, O)."""

    def make() -> tuple[list[Tensor], Tensor]:
        gathered = [_gather(layer, gating, dtype) for layer in layers]
        us = [u for u, _ in gathered]
        for i, bias in enumerate(biases):
            if bias is not None:
                us[i] = torch.cat([us[i], bias.expand(len(us[i]), 1, -1)], dim=1)
        return us, _stack([v for _, v in gathered], dim=1)

    numbers = layers[0].tailor_u[0].numel() + layers[0].tailor_v[0].numel()
    few = gating.slots_BK.numel() * numbers <= KEPT
    return _once(gating, (layers[0], "tailors"), make, keep=few)


def _joined(layers: Sequence[ComponentLinear], gating: Gating, dtype: torch.dtype) -> list[Tensor | None]:
    """What `_Products` takes beside x for learngenes and the whole bank, each sample's columns masked."""
    mask_B1J = _columns(layers[0], gating).unsqueeze(1).to(dtype)
    us = [layer.u * layer.sigma.unsqueeze(1) for layer in layers]
    vs: list[Tensor] = [layer.v for layer in layers]
    bank = [(layer.tailor_u * layer.tailor_sigma.unsqueeze(2)).flatten(0, 1) for layer in layers]
    v_bank = [layer.tailor_v.flatten(0, 1) for layer in layers]
    v_own, own = None, []
    if layers[0].u.requires_grad:
        us = [torch.cat(pair) for pair in zip(us, bank, strict=True)]
        vs = [v for pair in zip(vs, v_bank, strict=True) for v in pair]
    else:  # the bank beside the learngenes, whose gradients nobody asks for
        own, v_own = [u.to(dtype) for u in bank], _stack(v_bank).to(dtype)
    us = [u.to(dtype) for u in us]
    return [_stack(vs).to(dtype), mask_B1J, v_own, *us, *_biases(layers, dtype), *own]


def _biases(layers: Sequence[ComponentLinear], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]


def _once(gating: Gating | None, key: object, make: Callable[[], Made], *, keep: bool) -> Made:
    """What `make` makes, kept with the gating where calls are to share that."""
    kept = None if gating is None or torch.compiler.is_compiling() else gating.kept
    if kept is None or not keep or torch.is_grad_enabled():
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]  # type: ignore[no-any-return]


def _first(gating: Gating) -> Gating:
    """The samples up to the last that has a tailor."""
    return gating._replace(slots_BK=gating.slots_BK[: gating.on], weights_BK=gating.weights_BK[: gating.on])


def add_tailors_(layer: ComponentLinear, y_BTO: Tensor, x_BTI: Tensor, gating: Gating) -> Tensor:
    """y plus each sample's tailors, in place, for learngenes that were computed by themselves."""
    if gating.on == 0:
        return y_BTO
    (u_BMO,), v_BMI = _own([layer], _first(gating), x_BTI.dtype)
    y_BTO[: len(u_BMO)].baddbmm_(x_BTI[: len(v_BMI)] @ v_BMI.mT, u_BMO)
    return y_BTO


def _mixed(layer: ComponentLinear, x_BTI: Tensor, gating: Gating, *, joined: bool) -> Tensor:
    """y (B, T, O) of a layer whose classes weigh known tailors. Those are frozen: so the weights are not put into U,
    whose gradient nobody asks for, but onto the products with V. joined: of the whole bank."""
    dtype = x_BTI.dtype
    u_OR = (layer.u * layer.sigma.unsqueeze(1)).T.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    y_BTO = F.linear(F.linear(x_BTI, layer.v.to(dtype)), u_OR, bias)
    own, bank = layer.weigh(gating), layer.tailors
    if joined:
        scale_BJ = _columns(layer, own) * bank.sigma.flatten()
        h_BTJ = F.linear(x_BTI, bank.v.flatten(0, 1).to(dtype)) * scale_BJ.to(dtype).unsqueeze(1)
        return y_BTO + F.linear(h_BTJ, bank.u.flatten(0, 1).T.to(dtype))
    u_BKNO, sigma_BKN, v_BKNI = (_of_slots(tensor, own.slots_BK) for tensor in bank)
    scale_BM = (sigma_BKN * own.weights_BK.unsqueeze(2)).flatten(1)
    h_BTM = torch.bmm(x_BTI, v_BKNI.flatten(1, 2).to(dtype).mT) * scale_BM.to(dtype).unsqueeze(1)
    return torch.baddbmm(y_BTO, h_BTM, u_BKNO.flatten(1, 2).to(dtype))


def _gather(layer: ComponentLinear, gating: Gating, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each sample's own tailors: u (B, M, O), scaled by sigma and the gate, and v (B, M, I)."""
    u_BKNO, sigma_BKN, v_BKNI = (_of_slots(bank, gating.slots_BK) for bank in layer.tailors)
    u_BMO = (u_BKNO * (sigma_BKN * gating.weights_BK.unsqueeze(2)).unsqueeze(3)).flatten(1, 2)
    return u_BMO.to(dtype), v_BKNI.flatten(1, 2).to(dtype)


def _of_slots(bank: Tensor, slots_BK: Tensor) -> Tensor:
    """A bank's rows, (B, K, N, ...); unlike indexing, index_select has a backward pass of one operation."""
    return bank.index_select(0, slots_BK.flatten()).unflatten(0, slots_BK.shape)


def _columns(layer: ComponentLinear, gating: Gating) -> Tensor:
    """(B, J): how much of each component of the bank each sample has."""
    slots, count = layer.tailor_sigma.shape
    weights_BS = gating.weights_BK.new_zeros(len(gating.slots_BK), slots)
    return weights_BS.scatter_add(1, gating.slots_BK, gating.weights_BK).repeat_interleave(count, dim=1)


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(tensors, dim=dim) if len(tensors) > 1 else tensors[0]


class _Products(torch.autograd.Function):
    """y_i = h_i U_i + b_i with h = x V^T, and (x v^T) u_i on top where there are v and u_i of tailors' own.

    Those are each sample's (B, M, I) and (B, M, O), or a bank's (J, I) and (J, O) with a mask: a sample's columns of
    the products with V are multiplied by its mask, so that the others' tailors give nothing. A mask without v is for a
    bank that stands in the last J rows of each U_i and of each layer's part of V.

    Each sample's own may be the first samples' alone: the others have none. They are written first and the learngenes
    added to them, and the bias may be a last row of u_i (B, M + 1, O), against a column of ones: so neither it nor its
    gradient passes over a whole y once more. Only the gradients that are asked for are computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, v: Tensor, mask_B1J: Tensor | None, v_own: Tensor | None, *factors: Any
    ) -> tuple[Tensor, ...]:
        count = len(factors) // (2 if v_own is None else 3)
        us, biases, own = factors[:count], factors[count : 2 * count], factors[2 * count :]
        batch, tokens, _ = x_BTI.shape
        x = _rows(x_BTI)
        h = x @ v.T
        parts = h.split([len(u) for u in us], dim=1)
        h_own: list[Tensor] = []
        if v_own is not None:
            h_own = _inward_of_own(x_BTI, v_own, mask_B1J, own)
        elif mask_B1J is not None:
            _mask_(parts, mask_B1J)
        ys = []
        for i, (part, u, bias) in enumerate(zip(parts, us, biases, strict=True)):
            if v_own is not None and v_own.ndim == 3:
                biased = own[i].shape[1] > v_own.shape[1] // count
                y = _of_each(h_own[i], own[i], batch, own[i][0, -1] if biased else 0.0).addmm_(part, u)
            else:
                y = part @ u if bias is None else torch.addmm(bias, part, u)
                y = y.addmm_(h_own[i], own[i]) if h_own else y
            ys.append(y.view(batch, tokens, -1))
        ctx.count, ctx.batch = count, batch
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs[1] or needs[3] else None, h if any(needs[4 : 4 + count]) else None, v, mask_B1J, v_own,
            *us, *own, *h_own,
        )  # fmt: skip
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x, h, v, mask_B1J, v_own, *factors = ctx.saved_tensors
        count, batch, needs = ctx.count, ctx.batch, ctx.needs_input_grad
        us, own, h_own = factors[:count], factors[count : 2 * count], factors[2 * count :]
        dys = [_rows(dy) for dy in dys_BTO]
        dx = dv = dv_own = dh_own = None
        du_own: list[Tensor | None] = []
        if v_own is not None:
            each, rows = v_own.ndim == 3, v_own.shape[-2] // count
            own_dys = [dy[: len(v_own)] for dy in dys_BTO] if each else dys
            parts = [dy @ u[..., :rows, :].mT for dy, u in zip(own_dys, own, strict=True)]
            if mask_B1J is not None:
                _mask_(parts, mask_B1J)
            dh_own = _stack(parts, dim=-1)
            dx = _of_each(dh_own, v_own, batch) if needs[0] and each else None
            if needs[3]:
                dv_own = dh_own.mT @ (x.view(batch, -1, x.shape[1])[: len(v_own)] if each else x)
            for need, part, dy, other in zip(needs[4 + 2 * count :], h_own, own_dys, dys_BTO, strict=True):
                du = part.mT @ dy if need else None
                if du is not None and each and len(dy) < batch:  # the bias of the others
                    du[0, rows:] += other[len(dy) :].sum(dim=(0, 1))
                du_own.append(du)
        if needs[0] or needs[1]:
            parts = [dy @ u.T for dy, u in zip(dys, us, strict=True)]
            if mask_B1J is not None and v_own is None:
                _mask_(parts, mask_B1J)
            dh = _stack(parts, dim=1)
            dv = dh.T @ x if needs[1] else None
            if dx is not None:
                dx.addmm_(dh, v)
            elif needs[0]:
                dx = dh @ v if dh_own is None else (dh @ v).addmm_(dh_own, v_own)
        pieces = h.split([len(u) for u in us], dim=1) if h is not None else [None] * count
        need_u, need_b = needs[4 : 4 + count], needs[4 + count : 4 + 2 * count]
        du = [part.T @ dy if need else None for need, part, dy in zip(need_u, pieces, dys, strict=True)]
        db = [dy.sum(dim=0) if need else None for need, dy in zip(need_b, dys, strict=True)]
        dx_BTI = None if dx is None else dx.view(batch, -1, dx.shape[1])
        return dx_BTI, dv, None, dv_own, *du, *db, *du_own


def _inward_of_own(
    x_BTI: Tensor, v_own: Tensor, mask_B1J: Tensor | None, own: Sequence[Tensor]
) -> list[Tensor]:
    """x v^T of each layer: (B T, J), masked; or of each sample's own (B, T, M), a column of ones beside them where the
    layer's u has a row more."""
    h_own = (_rows(x_BTI) if v_own.ndim == 2 else x_BTI[: len(v_own)]) @ v_own.mT
    parts = h_own.split(h_own.shape[-1] // len(own), dim=-1)
    if mask_B1J is not None:
        _mask_(parts, mask_B1J)
    return [
        F.pad(part, (0, u.shape[-2] - part.shape[-1]), value=1.0) for part, u in zip(parts, own, strict=True)
    ]


def _of_each(a_BTM: Tensor, b_BMO: Tensor, batch: int, others: Tensor | float = 0.0) -> Tensor:
    """(batch T, O): a b of each of the first samples, in the rows of the others what they have instead."""
    samples, tokens, _ = a_BTM.shape
    if samples == batch:
        return torch.bmm(a_BTM, b_BMO).flatten(0, 1)
    y_BTO = a_BTM.new_empty(batch, tokens, b_BMO.shape[2])
    torch.bmm(a_BTM, b_BMO, out=y_BTO[:samples])
    y_BTO[samples:] = others
    return y_BTO.flatten(0, 1)


def _rows(x_BTI: Tensor) -> Tensor:
    return x_BTI.reshape(-1, x_BTI.shape[2])


def _mask_(parts: Sequence[Tensor], mask_B1J: Tensor) -> None:
    """Multiply the last J columns of each part by each sample's mask, in place."""
    batch, _, columns = mask_B1J.shape
    for part in parts:
        part.unflatten(0, (batch, -1))[..., -columns:].mul_(mask_B1J)
