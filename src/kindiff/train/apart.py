"""The tailors of a step's classes as tensors of their own, so that absent classes cost no gradient.

A bank's gradient is as large as the bank and almost all zero: filling, clipping and reading it would take more of a
step than the tailors themselves, and its size grows with the number of classes.

S slots of a bank, n slots of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kindiff.components.gates import TableGate
from kindiff.models.dit import DiT


def padded(rows: Tensor, count: int) -> Tensor:
    """At least `count` rows, if any, for shapes that stay the same: the first one again and again."""
    lacking = max(count - len(rows), 0) if len(rows) else 0
    return torch.cat([rows, rows[:1].expand(lacking)]) if lacking else rows


class Apart:
    """A model's banks of tailors; `at` puts a step's rows in their place."""

    def __init__(self, model: DiT) -> None:
        assert isinstance(model.gate, TableGate)
        self.gate = model.gate
        self.banks = [
            (model.get_submodule(owner), leaf, bank)
            for name, bank in model.named_parameters()
            for owner, _, leaf in [name.rpartition(".")]
            if leaf.startswith("tailor_")
        ]

    def places(self, slots_n: Tensor, images: int = 0) -> tuple[Tensor, Tensor]:
        """The rows of a step (each slot once) and every slot's place among them (S,), where the slots are.

        images: fill up to as many rows as so many images can have, if the bank has them, so that shapes stay the same
        from step to step; what is filled in repeats the first and is nobody's.
        """
        count = min(images * self.gate.slots_CK.shape[1], len(self.banks[0][2]))
        rows = padded(slots_n if len(slots_n) else slots_n.new_zeros(1), count)
        place_S = rows.new_zeros(len(self.banks[0][2]))
        place_S[slots_n] = torch.arange(len(slots_n), device=rows.device)
        return rows, place_S

    @contextlib.contextmanager
    def at(self, rows_n: Tensor, place_S: Tensor) -> Iterator[list[nn.Parameter]]:
        """Within, forward and backward, each bank has these rows, and the gate knows them by their places.

        Yields those that train, in the banks' order; their gradients are the banks' own.
        """
        table_CK = self.gate.slots_CK
        leaves = [nn.Parameter(bank.detach()[rows_n], bank.requires_grad) for _, _, bank in self.banks]
        try:
            self.gate.slots_CK = place_S[table_CK]
            for (owner, leaf, _), own in zip(self.banks, leaves, strict=True):
                setattr(owner, leaf, own)
            yield [own for own in leaves if own.requires_grad]
        finally:
            self.gate.slots_CK = table_CK
            for owner, leaf, bank in self.banks:
                setattr(owner, leaf, bank)
