"""The factored matrix: learngenes that are always on and a bank of tailors that a gate switches per sample.

A component is a row of `u`, an entry of `sigma` and a row of `v` (the columns of KIND's U and V, stored as rows
so that a slot, a class or a smaller rank is a contiguous piece).

B batch, T tokens, I/O features in/out, R learngene components, S slots, N components of a tailor, K slots per
sample, M = K N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindiff.components.algebra import Factors
from kindiff.models.layers import Gating, compute_dtype


class ComponentLinear(nn.Module):
    """y = W(c) x + bias with W(c) = sum_i sigma_i u_i v_i^T over the components that are on (KIND eq. 1, 2).

    Only those components are computed: cost follows the active rank, never the number of slots. With
    `rank=None` the learngenes are folded into one dense weight (cheaper above rank I O / (I + O)). Parameters
    start unset: `factorize`, `recombine` or a checkpoint fills them.
    """

    def __init__(
        self, features_in: int, features_out: int, *, rank: int | None, slots: int, tailor_rank: int
    ) -> None:
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.empty(features_out, features_in))
        else:
            self.u = nn.Parameter(torch.empty(rank, features_out))
            self.sigma = nn.Parameter(torch.empty(rank))
            self.v = nn.Parameter(torch.empty(rank, features_in))
        self.rank = rank
        self.bias = nn.Parameter(torch.empty(features_out))
        self.has_tailors = slots * tailor_rank > 0
        if self.has_tailors:
            self.tailor_u = nn.Parameter(torch.empty(slots, tailor_rank, features_out))
            self.tailor_sigma = nn.Parameter(torch.empty(slots, tailor_rank))
            self.tailor_v = nn.Parameter(torch.empty(slots, tailor_rank, features_in))

    @property
    def tailors(self) -> Factors:
        """The bank: u (S, N, O), sigma (S, N), v (S, N, I); only a layer that has tailors has one."""
        return Factors(self.tailor_u, self.tailor_sigma, self.tailor_v)

    def forward(self, x_BTI: Tensor, gating: Gating | None) -> Tensor:
        return self.together([self], x_BTI, gating)[0]

    @staticmethod
    def together(layers: Sequence[ComponentLinear], x_BTI: Tensor, gating: Gating | None) -> list[Tensor]:
        """Layers that share their input (q, k, v): it is rounded once, and their tailors' V sides are one product.

        sigma and the gate's weights scale U in fp32, before any rounding to the compute dtype.
        """
        x_BTI = compute_dtype(x_BTI)
        outputs = [layer.learngenes(x_BTI) for layer in layers]
        tailored = [(layer, y) for layer, y in zip(layers, outputs, strict=True) if layer.has_tailors]
        if tailored:
            assert gating is not None, "a layer with tailors needs a gate"
            _add_tailors_(tailored, x_BTI, gating)
        return outputs

    def learngenes(self, x_BTI: Tensor) -> Tensor:
        """What the learngenes alone give, bias included."""
        if self.rank is None:
            return F.linear(x_BTI, self.weight, self.bias)
        return F.linear(F.linear(x_BTI, self.v), (self.u * self.sigma.unsqueeze(1)).T, self.bias)

    @torch.no_grad()
    def merged_weight(self, gating: Gating | None = None, sample: int = 0) -> Tensor:
        """The dense (O, I) matrix that one sample of a gating sees; without a gating, the learngenes'."""
        weight_OI = self.weight if self.rank is None else (self.u.T * self.sigma) @ self.v
        if gating is not None and self.has_tailors:
            slots_K, weights_K = gating.slots_BK[sample], gating.weights_BK[sample]
            u_MO = self.tailor_u[slots_K].flatten(0, 1)
            v_MI = self.tailor_v[slots_K].flatten(0, 1)
            scale_M = (self.tailor_sigma[slots_K] * weights_K.unsqueeze(1)).flatten()
            weight_OI = weight_OI + (u_MO.T * scale_M) @ v_MI
        return weight_OI


def _add_tailors_(
    layers_and_outputs: Sequence[tuple[ComponentLinear, Tensor]], x_BTI: Tensor, gating: Gating
) -> None:
    """Add each sample's tailors to the outputs, in place."""
    slots_BK, weights_BK = gating
    layers = [layer for layer, _ in layers_and_outputs]
    v_BMI = torch.cat([layer.tailor_v[slots_BK].flatten(1, 2) for layer in layers], dim=1)
    h_BTM = torch.bmm(x_BTI, v_BMI.to(x_BTI.dtype).transpose(1, 2))
    sizes = [slots_BK.shape[1] * layer.tailor_sigma.shape[1] for layer in layers]
    for (layer, y_BTO), part in zip(layers_and_outputs, h_BTM.split(sizes, dim=2), strict=True):
        scale_BKN = layer.tailor_sigma[slots_BK] * weights_BK.unsqueeze(2)
        u_BMO = (layer.tailor_u[slots_BK] * scale_BKN.unsqueeze(3)).flatten(1, 2)
        y_BTO.baddbmm_(part, u_BMO.to(part.dtype))
