"""Products of rows with learngenes, and with each sample's own few components: by kernels of ours (CPU), of which one
pass over the rows does for several, or by the library.

B batch, T tokens, I/O features in/out, R components that all share, M components of a sample. What is of samples may be
of the first ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kindiff import native

MANY = 96
"""Components of a sample, of all layers that share an input, beyond which products are left to the library."""


def inward(x_BTI: Tensor, v_BMI: Tensor) -> Tensor:
    """x v^T of the samples that have v: (B, T, M)."""
    if _by_kernel(x_BTI, v_BMI):
        h_BTM = native.across(x_BTI, v_BMI, None, on=len(v_BMI))[0]
        assert h_BTM is not None
        return h_BTM
    return x_BTI[: len(v_BMI)] @ v_BMI.mT


def common(rows: Tensor, factors: Tensor) -> Tensor:
    """Rows (B T, I) times factors (I, R) that all share."""
    return native.multiply(rows, factors) if _multiplied(rows, factors) else rows @ factors


def joined(rows: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    """Each layer's rows times its factors; and, where kernels put them side by side, all of them as one tensor."""
    if not all(map(_multiplied, rows, factors)):
        return [a @ b for a, b in zip(rows, factors, strict=True)], None
    widths = [b.shape[1] for b in factors]
    whole = rows[0].new_empty(len(rows[0]), sum(widths))
    parts = whole.split(widths, dim=1)
    for a, b, part in zip(rows, factors, parts, strict=True):
        native.multiply(a, b, out=part)
    return parts, whole


def turned(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of rows a (B T, R) and b (B T, O): (R, O), by kernels in fp32."""
    return native.multiply_turned(a, b) if _multiplied(a, b) else a.T @ b


def outward(
    common: Tensor,
    u: Tensor,
    bias_O: Tensor | None,
    batch: int,
    h_BTM: Tensor | None = None,
    u_BMO: Tensor | None = None,
) -> Tensor:
    """y (batch, T, O): common (batch T, R) times u (R, O) plus the bias, and h u of the samples that have these.

    To the bit, a sample whose own components are zero is one that has none.
    """
    if _multiplied(common, u):
        y = native.multiply(common, u, batch=batch, h_BNM=h_BTM, u_BMO=u_BMO, bias_O=bias_O)
        return y.view(batch, -1, u.shape[1])
    product = common @ u if bias_O is None else torch.addmm(bias_O, common, u)
    y_BTO = product.view(batch, -1, u.shape[1])
    return y_BTO if h_BTM is None or u_BMO is None else add_outward_(y_BTO, h_BTM, u_BMO)


def add_outward_(y_BTO: Tensor, h_BTM: Tensor, u_BMO: Tensor) -> Tensor:
    """y + h u, in place, of the samples that have h and u."""
    if _by_kernel(y_BTO, u_BMO):
        return native.add_(y_BTO, h_BTM, u_BMO)
    y_BTO[: len(u_BMO)].baddbmm_(h_BTM, u_BMO)
    return y_BTO


def backward(
    dy_BTO: Tensor, u_BMO: Tensor, h_BTM: Tensor | None, *, du: bool, bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients through h u + bias: of h, and if wanted of u and of the bias."""
    if _by_kernel(dy_BTO, u_BMO):
        dh_BTM, du_BMO, db_O = native.across(dy_BTO, u_BMO, h_BTM if du else None, on=len(u_BMO), total=bias)
        assert dh_BTM is not None
        return dh_BTM, du_BMO, db_O
    own = dy_BTO[: len(u_BMO)]
    du_BMO = h_BTM.mT @ own if du and h_BTM is not None else None
    return own @ u_BMO.mT, du_BMO, dy_BTO.sum(dim=(0, 1)) if bias else None


def gathered(h_BTM: Tensor, x_BTI: Tensor) -> Tensor:
    """h^T x of the samples that have h: (B, M, I)."""
    if _by_kernel(x_BTI, h_BTM.mT):
        g_BMI = native.across(x_BTI, None, h_BTM, on=len(h_BTM))[1]
        assert g_BMI is not None
        return g_BMI
    return h_BTM.mT @ x_BTI[: len(h_BTM)]


def _by_kernel(rows: Tensor, own_BMI: Tensor) -> bool:
    return own_BMI.shape[1] <= MANY and _usable(rows, own_BMI)


def _multiplied(rows: Tensor, factors: Tensor) -> bool:
    return rows.dtype in native.PRODUCTS and _usable(rows, factors)


def _usable(rows: Tensor, others: Tensor) -> bool:
    """Whether the kernels, which autograd does not know, can be called here."""
    return not torch.is_grad_enabled() and rows.dtype == others.dtype and native.usable(rows, others)
