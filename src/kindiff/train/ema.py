"""An exponential moving average of what trains."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kindiff.models.dit import DiT


class Ema:
    """Average of the trained parameters; starts faster: decay min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: DiT, decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    def load_(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def model(self, model: DiT) -> DiT:
        """A copy of the model with the averaged parameters."""
        new = copy.deepcopy(model)
        for name, parameter in new.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])
        return new
