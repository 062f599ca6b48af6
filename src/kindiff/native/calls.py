"""The kernels as functions of tensors. `usable` says whether they can compute a call; what else could is the caller's.

B batch, N tokens, I/O/D features, M components of a sample. Tensors are fp32 or bf16, sums and moments fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kindiff.native.compiled import kernels

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = tuple(NAMES)
Bank = tuple[Tensor, Tensor, Tensor]


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels are there and take these tensors: plain ones on the CPU, in fp32 or bf16, eager mode."""
    return (
        all(
            t.device.type == "cpu" and t.dtype in DTYPES and type(t) in (Tensor, nn.Parameter)
            for t in tensors
        )
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and kernels() is not None
    )


def across(
    x_BNI: Tensor, v_BMI: Tensor | None, h_BNM: Tensor | None, *, on: int, total: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """In one pass over x: x v^T (on, N, M), h^T x (on, M, I) and, if wanted, the sum of x's rows (I,), in x's dtype.

    v_BMI and h_BNM are of the first `on` samples, M components each; without one of them its result is None.
    """
    x_BNI = x_BNI.contiguous()
    batch, tokens, width = x_BNI.shape
    pieces = _pieces(batch)
    count = next(t.shape[d] for t, d in ((v_BMI, 1), (h_BNM, 2)) if t is not None)
    out = g = sums = rows = None
    if v_BMI is not None:
        v_BMI, out = v_BMI.contiguous(), x_BNI.new_empty(on, tokens, count)
    if h_BNM is not None:
        rows = _rows_apart(h_BNM)
        g = _sums(x_BNI, on, pieces, count, width)
    if total:
        sums = _sums(x_BNI, batch * pieces, width)
    _call(
        "across", x_BNI, x_BNI, v_BMI, out, rows, 0 if rows is None else rows.stride(0), g, sums,
        batch, on, tokens, width, count, pieces,
    )  # fmt: skip
    dtype = x_BNI.dtype
    return (
        out,
        None if g is None else _summed(g).to(dtype),
        None if sums is None else sums.sum(dim=0).to(dtype),
    )


def add_(
    y_BNO: Tensor, h_BNM: Tensor | None = None, u_BMO: Tensor | None = None, bias_O: Tensor | None = None
) -> Tensor:
    """y + h u + bias, in place; h and u are of the first samples, the bias is everyone's. y is contiguous."""
    assert y_BNO.is_contiguous()
    batch, tokens, width = y_BNO.shape
    on = count = stride = 0
    if h_BNM is not None and u_BMO is not None:
        h_BNM, u_BMO = _rows_apart(h_BNM), u_BMO.contiguous()
        on, count, stride = len(u_BMO), u_BMO.shape[1], h_BNM.stride(0)
    _call("add", y_BNO, y_BNO, h_BNM, stride, u_BMO, bias_O, batch, on, tokens, width, count)
    return y_BNO


def take(
    banks: Sequence[Bank], slots_BK: Tensor | None, weights_BK: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Factors of L layers as products take them, in a dtype: each layer's u (B, K C, O), times sigma and the weight of
    the slot, and all layers' v (B, L K C, I).

    Banks are u (S, C, O), sigma (S, C) and v (S, C, I), fp32 and contiguous, C the same for all; a sample has the rows
    of its K slots. Without slots there is one sample, which has slot 0. Raises IndexError for a slot that is not there.
    """
    if slots_BK is not None and slots_BK.numel():
        lowest, highest = (int(slot) for slot in slots_BK.aminmax())
        if lowest < 0 or highest >= len(banks[0][0]):
            raise IndexError(f"slots {lowest} to {highest} of a bank of {len(banks[0][0])}.")
    slots_BK, weights_BK = (None if t is None else t.contiguous() for t in (slots_BK, weights_BK))
    batch, on = (1, 1) if slots_BK is None else slots_BK.shape
    count, inner = banks[0][2].shape[1:]
    us = [u.new_empty(batch, on * count, u.shape[2], dtype=dtype) for u, _, _ in banks]
    v_BLMI = banks[0][2].new_empty(batch, len(banks), on * count, inner, dtype=dtype)
    for i, (found, bank) in enumerate(zip(us, banks, strict=True)):
        _call(
            "take", found, *bank, slots_BK, weights_BK, found, v_BLMI[:, i], v_BLMI.stride(0),
            batch, on, count, found.shape[2], inner,
        )  # fmt: skip
    return us, v_BLMI.flatten(1, 2)


def take_back(
    gus: Sequence[Tensor],
    gv: Tensor,
    banks: Sequence[Bank],
    slots_BK: Tensor | None,
    weights_BK: Tensor | None,
) -> list[Bank]:
    """Gradients of the banks, from those of what `take` made of them; none of the weights."""
    slots_BK, weights_BK = (None if t is None else t.contiguous() for t in (slots_BK, weights_BK))
    batch, on = (1, 1) if slots_BK is None else slots_BK.shape
    gv_BLMI = gv.contiguous().view(batch, len(banks), -1, gv.shape[-1])
    gradients = []
    for i, (gu, (u, sigma, v)) in enumerate(zip(gus, banks, strict=True)):
        found = torch.empty_like(u), torch.empty_like(sigma), torch.empty_like(v)
        _call(
            "take_back", gu, gu.contiguous(), gv_BLMI[:, i], gv_BLMI.stride(0), u, sigma, slots_BK, weights_BK, *found,
            len(u), batch, on, *u.shape[1:], v.shape[2],
        )  # fmt: skip
        gradients.append(found)
    return gradients


def turn_back(gu_OR: Tensor, gv_IR: Tensor, u_RO: Tensor, sigma_R: Tensor, v_RI: Tensor) -> Bank:
    """Gradients of learngenes u, sigma and v, from those of u times sigma and of v, which stand turned."""
    found = torch.empty_like(u_RO), torch.empty_like(sigma_R), torch.empty_like(v_RI)
    _call("turn_back", gu_OR, gu_OR, gu_OR.stride(0), u_RO, sigma_R, found[0], found[1], *u_RO.shape)
    _call("turn_back", gv_IR, gv_IR, gv_IR.stride(0), None, None, found[2], None, *v_RI.shape)
    return found


def norm(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer normalisation, then times 1 + scale plus shift, in a dtype. x is fp32."""
    return _Norm.apply(x_BND, shift_BD, scale_BD, eps, dtype)  # type: ignore[no-any-return]


def residual(x_BND: Tensor, gate_BD: Tensor, y_BND: Tensor) -> Tensor:
    """x + gate y, in fp32. x is fp32."""
    return _Residual.apply(x_BND, gate_BD, y_BND)  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula, in the tensor's dtype."""
    return _Gelu.apply(x)  # type: ignore[no-any-return]


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
        _call("norm", y_BND, x_BND, shift_BD, scale_BD, stride, y_BND, moments, batch, tokens, width, eps)
        ctx.save_for_backward(x_BND, scale_BD, moments)
        return y_BND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_BND: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, scale_BD, moments = ctx.saved_tensors
        batch, tokens, width = x_BND.shape
        pieces = _pieces(batch)
        dx_BND, dshift, dscale = torch.empty_like(x_BND), *_sums(x_BND, 2, batch, pieces, width)
        dy_BND = dy_BND.contiguous()
        _call(
            "norm_back", dy_BND, dy_BND, x_BND, scale_BD, scale_BD.stride(0), moments, dx_BND, dshift, dscale,
            batch, tokens, width, pieces,
        )  # fmt: skip
        return dx_BND, _summed(dshift), _summed(dscale), None, None


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, gate_BD: Tensor, y_BND: Tensor) -> Tensor:
        x_BND, y_BND = x_BND.contiguous(), y_BND.contiguous()
        gate_BD, _, stride = _conditions(gate_BD, gate_BD, len(x_BND))
        z_BND = torch.empty_like(x_BND)
        _call("residual", y_BND, x_BND, gate_BD, stride, y_BND, z_BND, *x_BND.shape)
        ctx.save_for_backward(gate_BD, y_BND)
        return z_BND

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dz_BND: Tensor) -> tuple[Tensor | None, ...]:
        gate_BD, y_BND = ctx.saved_tensors
        batch, tokens, width = y_BND.shape
        pieces = _pieces(batch)
        dz_BND, dy_BND, dgate = (
            dz_BND.contiguous(),
            torch.empty_like(y_BND),
            _sums(y_BND, batch, pieces, width),
        )
        _call(
            "residual_back", y_BND, dz_BND, gate_BD, gate_BD.stride(0), y_BND, dy_BND, dgate,
            batch, tokens, width, pieces,
        )  # fmt: skip
        return dz_BND, _summed(dgate), dy_BND


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("gelu", x, x, y, x.numel())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        _call("gelu_back", x, x, dy, dx, x.numel())
        return dx


def _sums(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _pieces(batch: int) -> int:
    """Into how many parts a sample's rows are cut, so that every thread has some."""
    return -(-torch.get_num_threads() // max(batch, 1))


def _summed(parts: Tensor) -> Tensor:
    """The sum over the pieces (B, pieces, ...)."""
    return parts.sum(dim=1) if parts.shape[1] > 1 else parts[:, 0]


def _rows_apart(h_BNM: Tensor) -> Tensor:
    """(B N, M): rows at one distance from each other, across samples too."""
    rows = h_BNM.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _conditions(a_BD: Tensor, b_BD: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    """Two of a sample's vectors, such as parts of one tensor: with one distance between the rows of both. One row may
    be everyone's."""
    a_BD, b_BD = a_BD.expand(batch, -1), b_BD.expand(batch, -1)
    if a_BD.stride() != b_BD.stride() or a_BD.stride(1) != 1:
        a_BD, b_BD = a_BD.contiguous(), b_BD.contiguous()
    return a_BD, b_BD, a_BD.stride(0)


def _call(name: str, typed: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call the kernel of one tensor's dtype."""
    kernel = getattr(kernels(), f"{name}_{NAMES[typed.dtype]}")
    kernel(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
