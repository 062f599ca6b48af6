"""Models that are only described, for counting."""

from __future__ import annotations

import torch

from kindiff.classes import numbered
from kindiff.components.assembly import freeze_learngenes
from kindiff.components.build import Structure, empty, sizes_of, slots_by_share
from kindiff.config import DesignConfig
from kindiff.models.dit import DiT


def design(config: DesignConfig) -> DiT:
    """A model of this design without values, on the meta device: for counting."""
    classes = numbered(config.classes)
    shape = config.model.build(
        input_size=config.input_size,
        channels=config.channels,
        num_classes=config.classes,
        objective=config.objective,
    )
    with torch.device("meta"):
        if not config.learngene_rank:
            return DiT(shape, classes=classes)
        slots, width = sizes_of(slots_by_share(config.classes, config.share))
        structure = Structure(
            rank=config.learngene_rank, tailor_rank=config.tailor_rank, slots=slots, targets=config.targets,
            gate_width=config.mixes or width, gate="mixture" if config.mixes else "table",
        )  # fmt: skip
        model = empty(shape, classes, structure)
    if config.trains == "all":
        return model
    return freeze_learngenes(model, config.train_also)
