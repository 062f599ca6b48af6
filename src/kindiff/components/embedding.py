"""Class embeddings that are sums of known ones.

B batch, C classes, K known embeddings of a class, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixedEmbedding(nn.Module):
    """Each class's row a weighted sum of known rows, of which only the weights train; the null row stays as it is.

    Values start unset: `mixture` or a checkpoint fills them.
    """

    known_CKD: Tensor
    null_D: Tensor

    def __init__(self, classes: int, mixes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("known_CKD", torch.empty(classes, mixes, width))
        self.register_buffer("null_D", torch.empty(width))
        self.tailor_mix = nn.Parameter(torch.empty(classes, mixes))

    @property
    def weight(self) -> Tensor:
        """(C + 1, D): what a table of embeddings would hold."""
        rows_CD = (self.known_CKD * self.tailor_mix.unsqueeze(2)).sum(dim=1)
        return torch.cat([rows_CD, self.null_D.unsqueeze(0)])

    def forward(self, ids_B: Tensor) -> Tensor:
        return F.embedding(ids_B, self.weight)
