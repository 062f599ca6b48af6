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
from kindiff.components.product import activated, add_tailors_, products
from kindiff.components.strategy import Choice
from kindiff.models.activation import gelu
from kindiff.models.layers import Gating, compute_dtype


class ComponentLinear(nn.Module):
    """y = W(c) x + bias with W(c) = sum_i sigma_i u_i v_i^T over the components that are on (KIND eq. 1, 2).

    Only those components are computed: cost follows the active rank, never the number of slots. With
    `rank=None` the learngenes are folded into one dense weight (cheaper above rank I O / (I + O)). With `mix` each
    class weighs its slots in this matrix: parameter `tailor_mix`, (C, K), times the gate's weights.
    Parameters start unset: `factorize`, `recombine` or a checkpoint fills them.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        rank: int | None,
        slots: int,
        tailor_rank: int,
        mix: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if rank is None:
            self.weight = nn.Parameter(torch.empty(features_out, features_in))
        else:
            self.u = nn.Parameter(torch.empty(rank, features_out))
            self.sigma = nn.Parameter(torch.empty(rank))
            self.v = nn.Parameter(torch.empty(rank, features_in))
        self.rank = rank
        self.strategy: Choice = "auto"
        """How tailors are computed; `set_strategy_` overrules the rule."""
        self.bias = nn.Parameter(torch.empty(features_out))
        self.has_tailors = slots * tailor_rank > 0
        if self.has_tailors:
            self.tailor_u = nn.Parameter(torch.empty(slots, tailor_rank, features_out))
            self.tailor_sigma = nn.Parameter(torch.empty(slots, tailor_rank))
            self.tailor_v = nn.Parameter(torch.empty(slots, tailor_rank, features_in))
        self.tailor_mix = nn.Parameter(torch.empty(mix)) if mix is not None and self.has_tailors else None

    @property
    def tailors(self) -> Factors:
        """The bank: u (S, N, O), sigma (S, N), v (S, N, I); only a layer that has tailors has one."""
        return Factors(self.tailor_u, self.tailor_sigma, self.tailor_v)

    def weigh(self, gating: Gating) -> Gating:
        """The gating as this matrix has it."""
        if self.tailor_mix is None:
            return gating
        assert gating.ids_B is not None, "a mixture's weights are its classes'"
        return gating._replace(weights_BK=gating.weights_BK * self.tailor_mix[gating.ids_B])

    def tailor_of(self, gating: Gating, sample: int) -> Factors:
        """The components of all slots that one sample of a gating has, sigma scaled by their weights; copies."""
        slots_K, weights_K = gating.slots_BK[sample], self.weigh(gating).weights_BK[sample]
        u_KNO, sigma_KN, v_KNI = (bank[slots_K] for bank in self.tailors)
        return Factors(
            u_KNO.flatten(0, 1), (sigma_KN * weights_K.unsqueeze(1)).flatten(), v_KNI.flatten(0, 1)
        )

    def forward(self, x_BTI: Tensor, gating: Gating | None) -> Tensor:
        return self.together([self], x_BTI, gating)[0]

    def activated(self, x_BTI: Tensor, gating: Gating | None) -> Tensor:
        """GELU of what `forward` gives, computed with it where that can be."""
        if self.rank is None:
            return gelu(self(x_BTI, gating))
        return activated(self, compute_dtype(x_BTI), gating)

    @staticmethod
    def together(layers: Sequence[ComponentLinear], x_BTI: Tensor, gating: Gating | None) -> list[Tensor]:
        """Layers that share their input (q, k, v): it is rounded once, and one product serves their V sides."""
        x_BTI = compute_dtype(x_BTI)
        if len({(layer.rank is None, layer.has_tailors) for layer in layers}) > 1:
            return [layer.together([layer], x_BTI, gating)[0] for layer in layers]
        if layers[0].rank is not None:
            return products(layers, x_BTI, gating)
        outputs = [F.linear(x_BTI, layer.weight, layer.bias) for layer in layers]
        if layers[0].has_tailors:
            assert gating is not None, "a layer with tailors needs a gate"
            return [add_tailors_(layer, y, x_BTI, gating) for layer, y in zip(layers, outputs, strict=True)]
        return outputs

    @torch.no_grad()
    def merged_weight(self, gating: Gating | None = None, sample: int = 0) -> Tensor:
        """The dense (O, I) matrix that one sample of a gating sees; without a gating, the learngenes'."""
        weight_OI: Tensor = self.weight if self.rank is None else (self.u.T * self.sigma) @ self.v
        if gating is None or not self.has_tailors:
            return weight_OI
        return weight_OI + self.tailor_of(gating, sample).dense()
