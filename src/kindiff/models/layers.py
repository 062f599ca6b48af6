"""Layers of the transformer. A Linear takes a gate and ignores it, so that blocks need not know whether their
matrices are dense or made of components.

B batch, T tokens, I/O features in/out, K slots per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindiff import native
from kindiff.models.activation import gelu

FEW_TOKENS = 256
"""Up to which attention in fp32 may keep all scores: the square of them, for each head."""


class Gating(NamedTuple):
    """What a gate decides for a batch: which tailor slots are on for each sample, and how much.

    slots_BK int64 slot numbers; weights_BK float32. A weight of zero switches the slot off. ids_B: the class ids, for
    matrices that weigh slots by class. The rest is for calls without gradients that share a gating (`DiT.gating`): from
    sample `on` to the end every slot is off; in `kept` matrices keep what they made of it.
    """

    slots_BK: Tensor
    weights_BK: Tensor
    ids_B: Tensor | None = None
    on: int | None = None
    kept: dict[Any, Any] | None = None


class Linear(nn.Linear):
    """A dense matrix that accepts, and ignores, a gate."""

    def forward(self, x: Tensor, gating: Gating | None = None) -> Tensor:
        return super().forward(x)

    @staticmethod
    def together(layers: Sequence[Linear], x: Tensor, gating: Gating | None) -> list[Tensor]:
        """Several dense layers on one input, which is rounded to the compute dtype once."""
        x = compute_dtype(x)
        return [layer(x) for layer in layers]


def compute_dtype(x: Tensor) -> Tensor:
    """The tensor in the dtype that autocast gives matrix products here; as it is without autocast."""
    return x.to(products_dtype(x))


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast has matrix products with a tensor; the tensor's own without autocast."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # a question that torch.compile can trace
    return torch.get_autocast_dtype(device) if on else x.dtype


def project(layers: Sequence[nn.Module], x: Tensor, gating: Gating | None) -> list[Tensor]:
    """Apply layers that share their input (q, k, v); layers of one type that has `together` may share work.

    Others (a tuner wrapped around some of them, hooks) are called one by one.
    """
    together = getattr(type(layers[0]), "together", None)
    alike = len({type(layer) for layer in layers}) == 1
    if together is None or not alike or any(_hooked(layer) for layer in layers):
        return [layer(x, gating) for layer in layers]
    return together(layers, x, gating)


def activate(layer: nn.Module, x: Tensor, gating: Gating | None) -> Tensor:
    """GELU of a layer's output; a layer that has `activated` may compute both at once."""
    together = getattr(type(layer), "activated", None)
    return gelu(layer(x, gating)) if together is None or _hooked(layer) else together(layer, x, gating)


def _hooked(layer: nn.Module) -> bool:
    """Whether something wants to see the layer's calls."""
    of_all = not torch.compiler.is_compiling() and nn.modules.module._has_any_global_hook()
    return bool(
        of_all
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def attend(q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, heads: int) -> Tensor:
    """Attention of each head over the tokens: (B, T, D).

    On a CPU (benchmarks/operations.py) by a kernel of ours, where there is one, in fp32 for few tokens; else in bf16 by
    three plain operations, in training and everywhere without matrix units.
    All else is torch's fused kernel.
    """
    # Tuners may leave them in fp32.
    q_BTD, k_BTD, v_BTD = (compute_dtype(part) for part in (q_BTD, k_BTD, v_BTD))
    alike = (
        len({(part.dtype, part.shape) for part in (q_BTD, k_BTD, v_BTD)}) == 1 and q_BTD.shape[2] % heads == 0
    )
    ours = keeps_scores(q_BTD.dtype, q_BTD.shape[1])
    if alike and ours and native.multiplies(q_BTD, k_BTD, v_BTD):
        return native.attention(q_BTD, k_BTD, v_BTD, heads)
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q_BTD, k_BTD, v_BTD))
    cpu_bf16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if cpu_bf16 and (q.requires_grad or not native.MATRIX_UNITS):
        o = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v)
    return o.transpose(1, 2).flatten(2)


def keeps_scores(dtype: torch.dtype, tokens: int) -> bool:
    """Whether attention on a CPU may keep all scores for the backward pass: in fp32, where torch's kernel does not,
    while they are few."""
    return dtype == torch.bfloat16 or tokens <= FEW_TOKENS


def modulate(norm: nn.LayerNorm, x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """adaLN: norm(x) (1 + scale) + shift, one scale and shift a sample. For matrix products: perhaps in their dtype."""
    dtype = products_dtype(x_BTD)
    plain = norm.weight is None and _all_fp32(x_BTD, shift_BD, scale_BD) and dtype in native.DTYPES
    if plain and native.usable(x_BTD, shift_BD, scale_BD):
        return native.norm(x_BTD, shift_BD, scale_BD, norm.eps, dtype)
    return torch.addcmul(shift_BD.unsqueeze(1), norm(x_BTD), 1 + scale_BD.unsqueeze(1))


def add_gated(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """x + gate y, one gate a sample. It is backward that takes a kernel less passes than torch's operation."""
    training = torch.is_grad_enabled() and _all_fp32(x_BTD, gate_BD)
    if training and native.usable(x_BTD, gate_BD, y_BTD):
        return native.residual(x_BTD, gate_BD, y_BTD)
    return torch.addcmul(x_BTD, gate_BD.unsqueeze(1), y_BTD)


def conditions(rows: Tensor, x_BTD: Tensor, count: int) -> tuple[Tensor, ...]:
    """A modulation's parts, (B, D) each; in fp32, as the kernels take them, where x is and they can be used."""
    kernels = x_BTD.dtype == torch.float32 and native.usable(x_BTD, rows)
    return (rows.float() if kernels else rows).chunk(count, dim=1)


def _all_fp32(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def timestep_features(
    t_B: Tensor, width: int, *, reach_last: bool = False, max_period: float = 10_000.0
) -> Tensor:
    """Sinusoidal features of the timestep (Vaswani et al. 2017; cosines first, as in DiT): (B, width).

    The frequencies fall from 1 towards 1 / max_period, and with reach_last the last one is 1 / max_period itself
    (diffusers' DiT).
    """
    half = width // 2
    powers = -math.log(max_period) * torch.arange(half, device=t_B.device).float() / (half - reach_last)
    angles = t_B.float().unsqueeze(1) * powers.exp().unsqueeze(0)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(width: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos positions of side x side patches, row by row (He et al. 2022): (side * side, width).

    The first half of the width encodes the column, the second the row; sines before cosines, as in DiT.
    """
    quarter = width // 4
    omega = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64).unsqueeze(1) * omega
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = one_axis.repeat(side, 1)
    rows = one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
