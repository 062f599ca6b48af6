"""Passes of a group of layers of components that share their input, each by one kernel of layers.cpp.

B batch, N tokens, I/O features, L layers, R learngene components, K slots of a sample, M tailor components of a sample.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kindiff.native.calls import call, pieces_of, places

KINDS = 7
"""Of each layer: u (R, O), sigma (R,), v (R, I), bias (O,), and the bank's u (S, C, O), sigma (S, C), v (S, C, I)."""


def layers_forward(
    x_BNI: Tensor, slots_BK: Tensor, weights_BK: Tensor, parameters: Sequence[Tensor], *, gelu: bool = False
) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    """Each layer's y (B, N, O); with gelu, GELU of the one y; and for the backward pass the products with V: the
    learngenes' (B N, L R) and the tailors' (B, N, L M).

    parameters: fp32 and contiguous, of one shape in all layers, kind by kind. Raises ValueError for shapes that do not
    fit, IndexError for a slot that is not there.
    """
    sizes = _sizes(x_BNI, slots_BK, weights_BK, parameters)
    (batch, tokens, _, width, count, rank, slots, on, components) = sizes
    if slots_BK.numel():
        lowest, highest = (int(slot) for slot in slots_BK.aminmax())
        if lowest < 0 or highest >= slots:
            raise IndexError(f"slots {lowest} to {highest} of a bank of {slots}.")
    ys = [x_BNI.new_empty(batch, tokens, width) for _ in range(count)]
    active = torch.empty_like(ys[0]) if gelu else None
    h = x_BNI.new_empty(batch * tokens, count * rank)
    h_own = x_BNI.new_empty(batch, tokens, count * on * components)
    scratch = x_BNI.new_empty(
        _scratch("forward", x_BNI.dtype, sizes, torch.get_num_threads()), dtype=torch.uint8
    )
    call(
        "forward", x_BNI, x_BNI, places(parameters), slots_BK, weights_BK, scratch, places(ys), active, h, h_own,
        *sizes,
    )  # fmt: skip
    return ys, active, h, h_own


def layers_backward(
    dys_BNO: Sequence[Tensor],
    x_BNI: Tensor,
    h: Tensor,
    h_own: Tensor,
    slots_BK: Tensor,
    weights_BK: Tensor,
    parameters: Sequence[Tensor],
    *,
    before_gelu: Tensor | None,
    inner: bool,
    common: bool,
    biases: bool,
    own: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x (inner), and of the parameters: the learngenes (common), the biases, the tailors (own).

    before_gelu: y, where dys are of GELU.
    """
    sizes = _sizes(x_BNI, slots_BK, weights_BK, parameters)
    count = sizes[4]
    wanted = [common] * 3 + [biases] + [own] * 3
    found: list[Tensor | None] = []
    for i, kind in enumerate(wanted):
        like = parameters[i * count]
        found += (
            like.new_empty(count, *like.shape).unbind() if kind else [None] * count
        )  # one after the other
    dx = torch.empty_like(x_BNI) if inner else None
    pieces = pieces_of(len(x_BNI))
    size = _scratch("backward", x_BNI.dtype, sizes, torch.get_num_threads(), pieces, before_gelu is not None)
    scratch = x_BNI.new_empty(size, dtype=torch.uint8)
    dys = [dy.contiguous() for dy in dys_BNO]
    call(
        "backward", x_BNI, places(dys), before_gelu, x_BNI, h, h_own, places(parameters), slots_BK, weights_BK,
        scratch, dx, places(found), pieces, *sizes,
    )  # fmt: skip
    return dx, found


def _sizes(
    x_BNI: Tensor, slots_BK: Tensor, weights_BK: Tensor, parameters: Sequence[Tensor]
) -> tuple[int, ...]:
    count = len(parameters) // KINDS
    batch, _, inner = x_BNI.shape
    (rank, width), (slots, components) = parameters[0].shape, parameters[5 * count].shape
    factors = [(rank, width), (rank,), (rank, inner), (width,)]
    bank = [(slots, components, width), (slots, components), (slots, components, inner)]
    wanted = [shape for shape in factors + bank for _ in range(count)]
    found = [tuple(parameter.shape) for parameter in parameters]
    if found != wanted or len(slots_BK) != batch or weights_BK.shape != slots_BK.shape:
        gate = f"a gate for {len(slots_BK)}"
        raise ValueError(
            f"{batch} samples of {inner} features and {gate} do not fit layers of the shapes {found}."
        )
    return (*x_BNI.shape, width, count, rank, slots, slots_BK.shape[1], components)


@functools.lru_cache(maxsize=256)
def _scratch(
    name: str, dtype: torch.dtype, sizes: tuple[int, ...], threads: int, pieces: int = 0, gelu: bool = False
) -> int:
    """Bytes that a kernel needs for itself, with this many threads; it says so where it is given nothing else."""
    some = torch.empty(0, dtype=dtype)
    nothing = (ctypes.c_void_p * (KINDS * sizes[4]))()
    if name == "forward":
        return call(name, some, None, nothing, None, None, None, None, None, None, None, *sizes)
    before = nothing if gelu else None
    return call(
        name, some, None, before, None, None, None, nothing, None, None, None, None, nothing, pieces, *sizes
    )
