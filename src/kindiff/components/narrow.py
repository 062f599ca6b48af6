"""Products of rows with each sample's own few components: by one pass of a kernel of ours over the rows (CPU), where
the library's batched products take several, or by the library.

B batch, T tokens, I/O features in/out, M components of a sample. What is of samples may be of the first ones alone.
"""

from __future__ import annotations

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
    if _usable(common, u):
        y_BTO = (common @ u).view(batch, -1, u.shape[1])
        if u_BMO is not None and u_BMO.shape[1] <= MANY:
            return native.add_(y_BTO, h_BTM, u_BMO, bias_O)
        if bias_O is not None:
            native.add_(y_BTO, bias_O=bias_O)
    else:
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


def _usable(rows: Tensor, others: Tensor) -> bool:
    """Whether the kernels, which autograd does not know, can be called here."""
    return not torch.is_grad_enabled() and rows.dtype == others.dtype and native.usable(rows, others)
