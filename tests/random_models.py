"""Models with noise on every parameter, so that no zero-initialised part hides an error."""

from __future__ import annotations

import torch
from torch import nn

from kindiff.classes import ClassSet
from kindiff.config import DiTConfig
from kindiff.models import DiT


def noisy(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Noise added to every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def noisy_dit(config: DiTConfig, names: tuple[str, ...] | None = None, seed: int = 0) -> DiT:
    """A dense DiT of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiT(config, classes=ClassSet(names) if names else None)
    noisy(model, seed)
    return model.eval()
