"""The whole network trains: from random weights, or from the base's."""

from __future__ import annotations

from kindiff.config import RivalConfig
from kindiff.models.dit import DiT
from kindiff.rivals.base import Rival


def _scratch(model: DiT, config: RivalConfig, seed: int) -> DiT:
    return DiT(model.config, classes=model.classes)


def _full(model: DiT, config: RivalConfig, seed: int) -> DiT:
    return model


SCRATCH = Rival(wrap=_scratch)
FULL = Rival(wrap=_full, keeps=1e-5)
