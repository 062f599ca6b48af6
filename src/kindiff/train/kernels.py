"""Adam of many rows of many banks in one pass over memory (Triton), where plain operations take thirty.

Read on first use, on a GPU. S rows, n rows that are named, P numbers of a row over all banks.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kindiff.components.kernels import jit, tl

BLOCK = 1024
FACTS = 4
"""Of a block of columns in `places_of`: the bank's address, its width, the block's first column in it and in a row."""


def places_of(banks: Sequence[Tensor]) -> Tensor:
    """Where each block of a row's numbers stands: (blocks, FACTS), on the host. The banks (S, ...) must not move."""
    facts, first = [], 0
    for bank in banks:
        width = bank[0].numel()
        facts += [(bank.data_ptr(), width, at, first + at) for at in range(0, width, BLOCK)]
        first += width
    return torch.tensor(facts, dtype=torch.int64)


def adam_rows_(
    gradient_nP: Tensor, mean_SP: Tensor, square_SP: Tensor, steps_S: Tensor, rows_n: Tensor, first_n: Tensor,
    places: Tensor, lr: Tensor, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One step of the named rows, in the banks themselves (fp32), of which `places` says where they are.

    steps_S: this one counted. first_n: the place of the first row that is the same; the others' gradients do not count.
    """
    count, width = gradient_nP.shape
    with torch.cuda.device_of(gradient_nP):
        adam_rows[(len(places), count)](
            gradient_nP, mean_SP, square_SP, steps_S, rows_n, first_n, places, lr, width, 1 - betas[0], 1 - betas[1],
            math.log(betas[0]), math.log(betas[1]), eps, BLOCK=BLOCK, FACTS=FACTS,
        )  # fmt: skip


@jit
def adam_rows(
    gradient, mean, square, steps, rows, firsts, places, lr, width, new_mean, new_square, log_mean, log_square, eps,
    BLOCK: tl.constexpr, FACTS: tl.constexpr,
):  # fmt: skip
    block, i = tl.program_id(0), tl.program_id(1)
    if tl.load(firsts + i) == i:
        facts = places + block * FACTS
        bank = tl.load(facts).to(tl.pointer_type(tl.float32))
        bank_width, at, first = tl.load(facts + 1), tl.load(facts + 2), tl.load(facts + 3)
        row = tl.load(rows + i)
        column = tl.arange(0, BLOCK)
        inside = column < bank_width - at
        step, rate = tl.load(steps + row), tl.load(lr)
        own = row * width + first + column
        g = tl.load(gradient + i.to(tl.int64) * width + first + column, mask=inside, other=0.0)
        m = tl.load(mean + own, mask=inside, other=0.0)
        q = tl.load(square + own, mask=inside, other=0.0)
        value = tl.load(bank + row * bank_width + at + column, mask=inside, other=0.0)
        m += (g - m) * new_mean
        q += (g * g - q) * new_square
        tl.store(mean + own, m, mask=inside)
        tl.store(square + own, q, mask=inside)
        size = tl.sqrt(q / (1 - tl.exp(step * log_square))) + eps
        value -= m / (1 - tl.exp(step * log_mean)) / size * rate
        tl.store(bank + row * bank_width + at + column, value, mask=inside)
