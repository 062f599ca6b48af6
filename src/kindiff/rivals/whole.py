"""The whole network trains, from random weights or from the base's; or none of it but the class embedding."""

from __future__ import annotations

from kindiff.config import RivalConfig
from kindiff.models.dit import DiT
from kindiff.rivals.base import CLASS_ROWS, Rival


def _scratch(model: DiT, config: RivalConfig, seed: int) -> DiT:
    return DiT(model.config, classes=model.classes)


def _full(model: DiT, config: RivalConfig, seed: int) -> DiT:
    return model


def _embedding(model: DiT, config: RivalConfig, seed: int) -> DiT:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == CLASS_ROWS)
    return model


SCRATCH = Rival(wrap=_scratch)
FULL = Rival(wrap=_full, keeps=1e-5)
EMBEDDING = Rival(wrap=_embedding, keeps=1e-5)
