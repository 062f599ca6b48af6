"""An exponential moving average of what trains."""

from __future__ import annotations

import torch
from torch import Tensor

from kindiff.models.dit import DiT
from kindiff.train.sharding import held_as, local


class Ema:
    """Average of the trained parameters; starts faster: decay min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: DiT, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        average, live = ([local(t) for t in some.values()] for some in (self.average, self.live))
        torch._foreach_lerp_(average, live, 1 - decay)

    def load_(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            local(tensor).copy_(local(held_as(tensors[name], tensor)))
