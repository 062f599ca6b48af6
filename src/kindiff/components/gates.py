"""Gates: maps from a batch's class ids to the tailor slots that are on, and how much.

B batch, K slots per sample, S slots, D width. The null class switches every tailor off, so the learngenes are
the unconditional model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kindiff.models.layers import Gating


class TableGate(nn.Module):
    """A fixed row of slots and weights for each class id; the last row is the null class, all weights zero.

    One slot a class is KIND's one-hot gate (eq. 2); several classes on one slot make a tailor per task; two
    slots a class (superclass, class) make a multi-hot gate. An id outside the table is an error, never the
    base model.
    """

    slots_CK: Tensor
    weights_CK: Tensor

    def __init__(self, num_classes: int, width: int = 1) -> None:
        super().__init__()
        self.register_buffer("slots_CK", torch.zeros(num_classes + 1, width, dtype=torch.int64))
        self.register_buffer("weights_CK", torch.zeros(num_classes + 1, width))

    def fill_(self, slots_of_class: Sequence[Sequence[int]]) -> TableGate:
        """Set the slots of each class (equal numbers of them), every weight 1; in place, for construction."""
        self.slots_CK[:-1] = torch.tensor([list(slots) for slots in slots_of_class], dtype=torch.int64)
        self.weights_CK[:-1] = 1.0
        return self

    def forward(self, ids_B: Tensor, e_BD: Tensor) -> Gating:
        return Gating(*self._rows(ids_B))

    def _rows(self, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """Unlike indexing, index_select takes no negative id for another one."""
        return self.slots_CK.index_select(0, ids_B), self.weights_CK.index_select(0, ids_B)

    def slots_on(self, ids_B: Tensor) -> Tensor:
        """The slots, each once, that a batch of ids trains: those with a weight above zero."""
        on = self.weights_CK[ids_B] > 0
        return torch.unique(self.slots_CK[ids_B][on])


class MixtureGate(TableGate):
    """A table whose slots are known classes' tailors: how much of each a class has, every matrix says for itself.

    What a step trains are rows of classes, not slots.
    """

    def forward(self, ids_B: Tensor, e_BD: Tensor) -> Gating:
        last = len(self.slots_CK) - 2  # the null class's weights are zero, whatever row it reads
        return Gating(*self._rows(ids_B), ids_B.clamp(max=last))

    def slots_on(self, ids_B: Tensor) -> Tensor:
        """The classes of a batch of ids, each once, without the null class."""
        return torch.unique(ids_B[ids_B < len(self.slots_CK) - 1])


class SoftGate(nn.Module):
    """One weight a tailor, softmax(MLP(class embedding)), for all layers and matrices (DivControl)."""

    def __init__(self, num_classes: int, slots: int, embedding_width: int) -> None:
        super().__init__()
        self.null_id = num_classes
        self.slots = slots
        self.mlp = nn.Sequential(
            nn.Linear(embedding_width, embedding_width), nn.SiLU(), nn.Linear(embedding_width, slots)
        )

    def forward(self, ids_B: Tensor, e_BD: Tensor) -> Gating:
        weights_BS = self.mlp(e_BD).float().softmax(dim=1) * (ids_B != self.null_id).unsqueeze(1)
        slots_BS = torch.arange(self.slots, device=ids_B.device).expand(len(ids_B), -1)
        return Gating(slots_BS, weights_BS)

    def slots_on(self, ids_B: Tensor) -> Tensor:
        """Every slot, unless the whole batch is null."""
        return torch.arange(self.slots if bool((ids_B != self.null_id).any()) else 0)
