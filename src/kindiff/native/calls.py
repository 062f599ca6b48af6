"""The kernels as functions of tensors. `usable` says whether they can compute a call; what else could is the caller's.

B batch, N tokens, I/O/D features, M components of a sample. Tensors are fp32 or bf16, sums and moments fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kindiff.native.compiled import kernels
from kindiff.runtime import cpu_has

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = tuple(NAMES)
MATRIX_UNITS = cpu_has("amx_bf16")
"""Whether this CPU multiplies bf16 matrices in hardware (AMX)."""
PRODUCTS = (DTYPES[:1] if MATRIX_UNITS else DTYPES) if cpu_has("avx2") else ()
"""In which large products by the kernels are at least level with the library's on this CPU; matrix units (bf16) are its
alone."""
WIDEST, AT_ONCE = 48, 512 * 48
"""Of products.hpp: columns of a strip at most, and numbers that are packed at once."""


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
        and not torch._C._are_functorch_transforms_active()
        and kernels() is not None
    )


def multiplies(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these tensors, and large products of the first are theirs to compute."""
    return x.dtype in PRODUCTS and usable(x, *others)


def multiply(
    a_RK: Tensor,
    b_KO: Tensor,
    *,
    batch: int = 1,
    h_BNM: Tensor | None = None,
    u_BMO: Tensor | None = None,
    bias_O: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """a b + h u + bias, (R, O), of R = batch N rows; h and u are of the first samples, the bias is everyone's.

    Rounded once, at the end. out: where it is put, rows at one distance.
    """
    a_RK, (rows, inner), width = _rows_apart(a_RK), a_RK.shape, b_KO.shape[1]
    bias_O = None if bias_O is None else bias_O.contiguous()
    _check(inner == len(b_KO), a_RK, b_KO, bias_O, h_BNM, u_BMO)
    y = a_RK.new_empty(rows, width) if out is None else out
    on = count = stride = 0
    if h_BNM is not None and u_BMO is not None:
        h_BNM, u_BMO = _rows_apart(h_BNM.flatten(0, 1)), u_BMO.contiguous()
        on, count, stride = len(u_BMO), u_BMO.shape[1], h_BNM.stride(0)
    scratch = fp32_like(a_RK, (inner + on * count) * (width + WIDEST))
    call(
        "multiply", y, a_RK, a_RK.stride(0), b_KO, *b_KO.stride(), scratch, h_BNM, stride, u_BMO, bias_O,
        y, y.stride(0), batch, on, rows // max(batch, 1), inner, width, count,
    )  # fmt: skip
    return y


def multiply_turned(a_NR: Tensor, b_NO: Tensor) -> Tensor:
    """a^T b, (R, O), in fp32."""
    a_NR, b_NO = _rows_apart(a_NR), _rows_apart(b_NO)
    (rows, count), width = a_NR.shape, b_NO.shape[1]
    _check(rows == len(b_NO), a_NR, b_NO)
    g = fp32_like(a_NR, count, width)
    first = fp32_like(a_NR, (rows + 1) * (count + WIDEST))
    second = fp32_like(a_NR, AT_ONCE * torch.get_num_threads())
    rows_of_both = a_NR, a_NR.stride(0), b_NO, b_NO.stride(0)
    call("multiply_turned", a_NR, *rows_of_both, first, second, g, rows, count, width)
    return g


def across(
    x_BNI: Tensor, v_BMI: Tensor | None, h_BNM: Tensor | None, *, on: int, total: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """In one pass over x: x v^T (on, N, M), h^T x (on, M, I) and, if wanted, the sum of x's rows (I,), in x's dtype.

    v_BMI and h_BNM are of the first `on` samples, M components each; without one of them its result is None.
    """
    x_BNI = x_BNI.contiguous()
    batch, tokens, width = x_BNI.shape
    _check(v_BMI is None or v_BMI.shape[2] == width, x_BNI, v_BMI, h_BNM)
    pieces = pieces_of(batch)
    count = next(t.shape[d] for t, d in ((v_BMI, 1), (h_BNM, 2)) if t is not None)
    out = g = sums = rows = None
    if v_BMI is not None:
        v_BMI, out = v_BMI.contiguous(), x_BNI.new_empty(on, tokens, count)
    if h_BNM is not None:
        rows = _rows_apart(h_BNM.flatten(0, 1))
        g = fp32_like(x_BNI, on, pieces, count, width)
    if total:
        sums = fp32_like(x_BNI, batch * pieces, width)
    call(
        "across", x_BNI, x_BNI, v_BMI, out, rows, 0 if rows is None else rows.stride(0), g, sums,
        batch, on, tokens, width, count, pieces,
    )  # fmt: skip
    dtype = x_BNI.dtype
    return (
        out,
        None if g is None else summed(g).to(dtype),
        None if sums is None else sums.sum(dim=0).to(dtype),
    )


def add_(
    y_BNO: Tensor, h_BNM: Tensor | None = None, u_BMO: Tensor | None = None, bias_O: Tensor | None = None
) -> Tensor:
    """y + h u + bias, in place; h and u are of the first samples, the bias is everyone's. y is contiguous."""
    assert y_BNO.is_contiguous()
    batch, tokens, width = y_BNO.shape
    _check(u_BMO is None or u_BMO.shape[2] == width, y_BNO, h_BNM, u_BMO, bias_O)
    on = count = stride = 0
    if h_BNM is not None and u_BMO is not None:
        h_BNM, u_BMO = _rows_apart(h_BNM.flatten(0, 1)), u_BMO.contiguous()
        on, count, stride = len(u_BMO), u_BMO.shape[1], h_BNM.stride(0)
    call("add", y_BNO, y_BNO, h_BNM, stride, u_BMO, bias_O, batch, on, tokens, width, count)
    return y_BNO


def _check(fits: bool, first: Tensor, *others: Tensor | None) -> None:
    """That tensors fit each other, as torch's operations see to."""
    if not fits or any(other is not None and other.dtype != first.dtype for other in others):
        shapes = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in (first, *others) if t is not None)
        raise RuntimeError(f"tensors that do not fit each other: {shapes}.")


def fp32_like(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def pieces_of(batch: int) -> int:
    """Into how many parts a sample's rows are cut, so that every thread has some."""
    return -(-torch.get_num_threads() // max(batch, 1))


def summed(parts: Tensor) -> Tensor:
    """The sum over the pieces (B, pieces, ...)."""
    return parts.sum(dim=1) if parts.shape[1] > 1 else parts[:, 0]


def _rows_apart(rows: Tensor) -> Tensor:
    """The rows, at one distance from each other, and each in one piece."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def call(name: str, typed: Tensor, *arguments: Any) -> int:
    """Call the kernel of one tensor's dtype, and give what it returns; of tensors it is told where they are."""
    return plain_call(f"{name}_{NAMES[typed.dtype]}", *arguments)


def plain_call(name: str, *arguments: Any) -> int:
    """The same of a kernel that there is once."""
    kernel = getattr(kernels(), name)
    return kernel(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])  # type: ignore[no-any-return]


def places(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Where tensors are, for a kernel that takes several."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])
