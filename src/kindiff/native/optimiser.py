"""Adam of named rows of many banks, by the kernel of optimiser.cpp.

S rows, n named ones, P numbers of a row over all banks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kindiff.native.calls import places, plain_call


def adam_rows_(
    banks: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    rows_n: Tensor,
    from_n: Tensor,
    mean_SP: Tensor,
    square_SP: Tensor,
    steps_S: Tensor,
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step (Kingma & Ba 2015) of rows, each named once, in the banks (S, ...) themselves; fp32 and contiguous.

    from_n: where each row stands in the gradients, of which None is zeros. steps_S: this step counted.

    Raises IndexError for a row that is not there.
    """
    if len(rows_n) and not 0 <= int(rows_n.min()) <= int(rows_n.max()) < len(steps_S):
        raise IndexError(f"rows {int(rows_n.min())} to {int(rows_n.max())} of banks of {len(steps_S)}.")
    rows_n, from_n = (numbers.to(torch.int64).contiguous() for numbers in (rows_n, from_n))
    offsets = torch.tensor([0, *(bank[0].numel() for bank in banks)], device="cpu").cumsum(0)
    given = [None if gradient is None else gradient.contiguous() for gradient in gradients]
    plain_call(
        "adam_rows", places(given), places(banks), offsets, rows_n, from_n, steps_S, mean_SP,
        square_SP, len(rows_n), len(banks), rate, *betas, eps,
    )  # fmt: skip
