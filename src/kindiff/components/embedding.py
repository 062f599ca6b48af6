"""Class embeddings that are sums of known ones.

B batch, C classes, K known embeddings of a class, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixedEmbedding(nn.Module):
    """Each class's row a weighted sum of known rows, of which only the weights train; the null row stays as it is.

    Parameters start unset: `mixture` or a checkpoint fills them.
    """

    known_RKD: Tensor

    def __init__(self, rows: int, mixes: int, width: int) -> None:
        """rows: C + 1, the last for the null class, of whose known rows the first is its own."""
        super().__init__()
        self.register_buffer("known_RKD", torch.empty(rows, mixes, width))
        self.mix = nn.Parameter(torch.empty(rows, mixes))

    @property
    def weight(self) -> Tensor:
        """(C + 1, D): what a table of embeddings would hold."""
        rows_CD = (self.known_RKD[:-1] * self.mix[:-1].unsqueeze(2)).sum(dim=1)
        return torch.cat([rows_CD, self.known_RKD[-1, :1]])

    def forward(self, ids_B: Tensor) -> Tensor:
        return F.embedding(ids_B, self.weight)
