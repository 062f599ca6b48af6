"""The kernel of the tailors' optimiser against the plain arithmetic; without a GPU Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kindiff.train.optimiser import RowAdam

pytest.importorskip("triton", minversion="3.6" if torch.cuda.is_available() else "3.8")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_rows_move_as_by_plain_operations() -> None:
    """Three steps of banks wider than a block; a row that is named again takes one step, others none."""
    generator = torch.Generator().manual_seed(0)
    banks = [nn.Parameter(torch.randn(5, *shape, generator=generator)) for shape in ((3, 400), (3,))]
    plain, ours = RowAdam(banks), RowAdam([nn.Parameter(bank.detach().clone().to(DEVICE)) for bank in banks])
    for named in ([3, 1, 3, 3], [0, 1, 0, 0], [4, 4, 4, 4]):
        rows = torch.tensor(named)
        for bank in banks:
            bank.grad = torch.randn(bank.shape, generator=generator)
        gradient = torch.cat([bank.grad.flatten(1)[rows] for bank in banks], dim=1)
        plain.step(rows, 0.1)
        first = (rows.unsqueeze(1) == rows).int().argmax(dim=1)
        held = [bank.detach() for bank in ours.banks]
        ours._step_in_place(gradient.to(DEVICE), rows.to(DEVICE), first.to(DEVICE), 0.1, held)
    for bank, other in zip(banks, ours.banks, strict=True):
        torch.testing.assert_close(other.cpu(), bank, rtol=1e-5, atol=1e-6)
    for key, tensor in plain.tensors().items():
        torch.testing.assert_close(ours.tensors()[key].cpu(), tensor, rtol=1e-5, atol=1e-7, msg=key)
    assert ours.steps_S.tolist() == [1, 2, 0, 1, 1]
