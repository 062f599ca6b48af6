"""The kernel of the tailors' optimiser against the plain arithmetic; without a GPU Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kindiff.train.optimiser import BETAS, EPS, RowAdam

pytest.importorskip("triton", minversion="3.6" if torch.cuda.is_available() else "3.8")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_rows_move_as_by_plain_operations() -> None:
    """Three steps of banks wider than a block; a row that is named again takes one step, others none."""
    from kindiff.train.kernels import adam_rows_, places_of

    generator = torch.Generator().manual_seed(0)
    banks = [nn.Parameter(torch.randn(5, *shape, generator=generator)) for shape in ((3, 400), (3,))]
    plain = RowAdam(banks)
    mean, square, steps = (t.clone().to(DEVICE) for t in (plain.mean_SP, plain.square_SP, plain.steps_S))
    ours = [bank.detach().clone().to(DEVICE) for bank in banks]
    places = places_of(ours).to(DEVICE)
    assert len(places) == 3  # 1,200 numbers of a row take two blocks
    for named in ([3, 1, 3, 3], [0, 1, 0, 0], [4, 4, 4, 4]):
        rows = torch.tensor(named)
        for bank in banks:
            bank.grad = torch.randn(bank.shape, generator=generator)
        gradient = torch.cat([bank.grad.flatten(1)[rows] for bank in banks], dim=1).to(DEVICE)
        plain.step(rows, 0.1)
        first = (rows.unsqueeze(1) == rows).int().argmax(dim=1)
        steps[rows] += 1
        lr = torch.tensor(0.1, device=DEVICE)
        adam_rows_(gradient, mean, square, steps, rows.to(DEVICE), first.to(DEVICE), places, lr, BETAS, EPS)
    for bank, other in zip(banks, ours, strict=True):
        torch.testing.assert_close(other.cpu(), bank.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean.cpu(), plain.mean_SP, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(square.cpu(), plain.square_SP, rtol=1e-5, atol=1e-7)
    assert steps.tolist() == [1, 2, 0, 1, 1]
