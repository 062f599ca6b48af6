"""Classifier-free guidance (Ho & Salimans 2022).

B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, H, W), timesteps (B,), class ids (B,)) -> output."""


def guided(model: Model, ids_B: Tensor, *, null_id: int, scale: float, channels: int) -> Callable:
    """predict(x, t) with guidance: null + scale (class - null) on all `channels` of the prediction.

    The null pass has every tailor off, so the learngenes are the unconditional model. Both passes are one
    batch. Output channels beyond `channels` (a learned range) come from the class pass.
    """
    if scale == 1.0:
        return lambda x, t_B: model(x, t_B, ids_B)
    both_ids = torch.cat([ids_B, torch.full_like(ids_B, null_id)])

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        conditional, null = model(torch.cat([x, x]), torch.cat([t_B, t_B]), both_ids).chunk(2)
        mixed = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([mixed, conditional[:, channels:]], dim=1)

    return predict
