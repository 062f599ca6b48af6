"""Component algebra: pure functions of factors. W = sum_i sigma_i u_i v_i^T, components as rows.

I/O features in/out, R components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The components of one matrix: u (R, O), sigma (R,), v (R, I)."""

    u: Tensor
    sigma: Tensor
    v: Tensor

    def dense(self) -> Tensor:
        """The matrix itself, (O, I)."""
        return (self.u.T * self.sigma) @ self.v

    def first(self, rank: int) -> Factors:
        """The first components."""
        return Factors(self.u[:rank], self.sigma[:rank], self.v[:rank])


def svd(weight_OI: Tensor) -> Factors:
    """A dense matrix as its min(O, I) singular components, largest first (KIND eq. 1)."""
    u_OR, sigma_R, v_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    return Factors(u_OR.T.contiguous(), sigma_R, v_RI.contiguous())


def canonical(factors: Factors) -> Factors:
    """The same matrix as its singular components, without ever forming it: QR of U and V, SVD of the core.

    Returns min(R, O, I) components, largest first, so that a smaller rank is a prefix whose error is the norm
    of the singular values left out.
    """
    q_u, core_u = torch.linalg.qr(factors.u.T)
    q_v, core_v = torch.linalg.qr(factors.v.T)
    inner = svd((core_u * factors.sigma) @ core_v.T)
    return Factors((q_u @ inner.u.T).T.contiguous(), inner.sigma, (q_v @ inner.v.T).T.contiguous())


def fresh(count: int, features_out: int, features_in: int, generator: torch.Generator) -> Factors:
    """Components that contribute nothing yet: u zero, sigma one, v random of unit length."""
    v = torch.randn(count, features_in, generator=generator)
    return Factors(torch.zeros(count, features_out), torch.ones(count), v / v.norm(dim=1, keepdim=True))


def random(
    count: int, features_out: int, features_in: int, active: int, generator: torch.Generator
) -> Factors:
    """Per-factor random components: `active` of them add up to the variance of a Xavier matrix.

    u and v are random of unit length, sigma the same for all: E|W|^2 = active sigma^2 equals the Xavier
    matrix's 2 O I / (O + I).
    """
    u = torch.randn(count, features_out, generator=generator)
    v = torch.randn(count, features_in, generator=generator)
    sigma = (2 * features_out * features_in / ((features_out + features_in) * active)) ** 0.5
    return Factors(
        u / u.norm(dim=1, keepdim=True), torch.full((count,), sigma), v / v.norm(dim=1, keepdim=True)
    )
