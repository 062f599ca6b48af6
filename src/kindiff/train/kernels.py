"""Adam's arithmetic for many rows in one pass over memory (Triton), where plain operations take twenty.

Read on first use, on a GPU. S rows, n rows that are named, P numbers of a row.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
from torch import Tensor

from kindiff.components.kernels import jit, tl

BLOCK = 1024


def adam_rows_(
    gradient_nP: Tensor, mean_SP: Tensor, square_SP: Tensor, steps_S: Tensor, rows_n: Tensor, first_n: Tensor,
    lr: Tensor, betas: tuple[float, float], eps: float,
) -> Tensor:  # fmt: skip
    """Moves the moments of the named rows; returns what to subtract from them, in the gradient's place.

    steps_S: this one counted. first_n: the place of the first row that is the same; the others take what that takes.
    """
    count, width = gradient_nP.shape
    with torch.cuda.device_of(gradient_nP):
        adam_rows[(-(-width // BLOCK),)](
            gradient_nP, mean_SP, square_SP, steps_S, rows_n, first_n, lr, count, width, 1 - betas[0], 1 - betas[1],
            math.log(betas[0]), math.log(betas[1]), eps, BLOCK=BLOCK,
        )  # fmt: skip
    return gradient_nP


@jit
def adam_rows(
    gradient, mean, square, steps, rows, firsts, lr, count, width, new_mean, new_square, log_mean, log_square, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    rate = tl.load(lr)
    to = gradient + column
    for i in range(0, count):
        first = tl.load(firsts + i)
        if first == i:
            row = tl.load(rows + i)
            at = row * width + column
            step = tl.load(steps + row)
            g = tl.load(to, mask=inside, other=0.0)
            m = tl.load(mean + at, mask=inside, other=0.0)
            q = tl.load(square + at, mask=inside, other=0.0)
            m += (g - m) * new_mean
            q += (g * g - q) * new_square
            tl.store(mean + at, m, mask=inside)
            tl.store(square + at, q, mask=inside)
            size = tl.sqrt(q / (1 - tl.exp(step * log_square))) + eps
            tl.store(to, m / (1 - tl.exp(step * log_mean)) / size * rate, mask=inside)
        else:
            tl.store(to, tl.load(gradient + first * width + column, mask=inside, other=0.0), mask=inside)
        to += width
