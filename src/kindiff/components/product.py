"""What component matrices compute, forward and backward, written once for all of them.

The plain reference is `ComponentLinear.merged_weight`: one dense matrix for each sample. Here nothing of that size is
formed. passes.py multiplies, forward and backward.

B batch, T tokens, I/O features in/out, R learngene components, M tailor components of a sample, S slots, N components
of a slot, K slots per sample, J = S N components of a whole bank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kindiff import native
from kindiff.components import narrow
from kindiff.components.fused import FusedProducts
from kindiff.components.passes import Gathered, Products, stack
from kindiff.components.strategy import strategy_of
from kindiff.models.activation import gelu
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
        return list(Products.apply(x_BTI, v, None, None, *us, *biases))
    if _trained_by_kernels(layers, gating, x_BTI):
        return _by_kernels(layers, x_BTI, gating)
    how = strategy_of(layers, gating, dtype).name
    if first.tailor_mix is not None:
        return [_mixed(layer, x_BTI, gating, joined=how == "joined") for layer in layers]
    if how == "joined":
        return list(Products.apply(x_BTI, *_joined(layers, gating, dtype)))
    us, v, biases = _common(layers, gating, dtype)
    if how == "fused":
        own, v_own = _own(layers, gating, dtype)
        rows = [bias.unsqueeze(0) for bias in biases if bias is not None]  # all layers have one, or none
        bias = stack(rows) if rows else None
        return list(FusedProducts.apply(x_BTI, v, v_own, stack(us), bias, stack(own, dim=1), len(layers)))
    own, v_own = _own(layers, _first(gating), dtype)
    return list(Products.apply(x_BTI, v, None, v_own, *us, *biases, *own))


def activated(layer: ComponentLinear, x_BTI: Tensor, gating: Gating | None) -> Tensor:
    """GELU of a factored layer's y (B, T, O), in one pass with it where the kernels can."""
    if layer.has_tailors and gating is not None and _trained_by_kernels([layer], gating, x_BTI):
        return _by_kernels([layer], x_BTI, gating, gelu=True)[0]
    return gelu(products([layer], x_BTI, gating)[0])


def _by_kernels(
    layers: Sequence[ComponentLinear], x_BTI: Tensor, gating: Gating, *, gelu: bool = False
) -> list[Tensor]:
    parameters = ((each.u, each.sigma, each.v, each.bias, *each.tailors) for each in layers)
    found = itertools.chain.from_iterable(zip(*parameters, strict=True))
    return list(Gathered.apply(x_BTI, gating.slots_BK, gating.weights_BK, gelu, *found))


def _trained_by_kernels(layers: Sequence[ComponentLinear], gating: Gating, x: Tensor) -> bool:
    """Whether `Gathered` is to compute a step of training, and can."""
    if any(each.bias is None or each.tailor_mix is not None for each in layers):
        return False
    factors = [t for each in layers for t in (each.u, each.sigma, each.v, each.bias, *each.tailors)]
    return (
        torch.is_grad_enabled()
        and strategy_of(layers, gating, x.dtype).name == "gathered"
        and gating.on is None
        and not gating.weights_BK.requires_grad
        and len({(each.u.shape, each.tailor_sigma.shape) for each in layers}) == 1
        and len(layers) * gating.slots_BK.shape[1] * layers[0].tailor_sigma.shape[1] <= narrow.MANY
        and gating.slots_BK.dtype == torch.int64
        and gating.slots_BK.shape == gating.weights_BK.shape
        and all(t.dtype == torch.float32 for t in (gating.weights_BK, *factors))
        and all(t.is_contiguous() for t in factors)
        and native.multiplies(x, gating.weights_BK, *factors)
    )


def _common(
    layers: Sequence[ComponentLinear], gating: Gating | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """Of the learngenes: each layer's u, scaled by sigma; the v of all; each layer's bias."""

    def make() -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        us = [(layer.u * layer.sigma.unsqueeze(1)).to(dtype) for layer in layers]
        return us, stack([layer.v for layer in layers]).to(dtype), _biases(layers, dtype)

    rounded = dtype != layers[0].u.dtype  # else little is saved, for as much memory as the model's
    return _once(gating, (*layers, "learngenes"), make, keep=rounded)


def _own(
    layers: Sequence[ComponentLinear], gating: Gating, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Of each sample's own tailors: each layer's u (B, M, O), scaled by sigma and the gate, and v (B, M, I) of all."""

    def make() -> tuple[list[Tensor], Tensor]:
        gathered = [_gather(layer, gating, dtype) for layer in layers]
        return [u for u, _ in gathered], stack([v for _, v in gathered], dim=1)

    numbers = layers[0].tailor_u[0].numel() + layers[0].tailor_v[0].numel()
    few = gating.slots_BK.numel() * numbers <= KEPT
    return _once(gating, (*layers, "tailors"), make, keep=few)


def _joined(layers: Sequence[ComponentLinear], gating: Gating, dtype: torch.dtype) -> list[Tensor | None]:
    """What `Products` takes beside x for learngenes and the whole bank, each sample's columns masked."""
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
        own, v_own = [u.to(dtype) for u in bank], stack(v_bank).to(dtype)
    us = [u.to(dtype) for u in us]
    return [stack(vs).to(dtype), mask_B1J, v_own, *us, *_biases(layers, dtype), *own]


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
    return narrow.add_outward_(y_BTO, narrow.inward(x_BTI, v_BMI), u_BMO)


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
