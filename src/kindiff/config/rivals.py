"""What KIND is compared with: which method, and a run that teaches a dense model new classes with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from kindiff.config.runs import DataConfig, TrainConfig
from kindiff.errors import UsageError

RivalMethod = Literal[
    "scratch", "full", "embedding", "lora", "dora", "pissa", "oft", "boft", "loha", "lokr", "vera", "hra", "svdiff",
    "heur-lg", "auto-lg", "tleg", "fine", "wave",
]  # fmt: skip

# The settings that each method reads; the others must stay at their defaults.
SETTINGS: dict[str, tuple[str, ...]] = {
    "scratch": (), "full": (), "embedding": (), "svdiff": (), "tleg": (), "wave": (),
    "lora": ("rank", "alpha"), "dora": ("rank", "alpha"), "pissa": ("rank", "alpha"),
    "loha": ("rank", "alpha"), "lokr": ("rank", "alpha"),
    "oft": ("rank",), "boft": ("rank",), "vera": ("rank",), "hra": ("rank",),
    "heur-lg": ("inherit",), "auto-lg": ("inherit", "blocks"), "fine": ("sigma_share",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RivalConfig:
    """A method that teaches a dense model new classes. A setting that the method does not use is an error."""

    method: RivalMethod = "lora"
    """scratch, full: the whole network, from random weights or the base's. embedding: the class embedding alone, the
    least there is (textual inversion's idea, Gal et al. 2023). lora .. hra: peft's tuners on the six
    matrices of every block. svdiff: their singular values. heur-lg .. wave: other learngene methods
    (docs/rivals.md)."""
    rank: int = 8
    """lora, dora, pissa, loha, lokr, vera: rank. oft, boft: side of a block, a divisor of the width. hra: number of
    reflections, even."""
    alpha: float = 0.0
    """lora, dora, pissa, loha, lokr: what is added is scaled by alpha / rank; 0 for a scale of 1."""
    inherit: int = 2
    """heur-lg, auto-lg: blocks that are inherited; the others start random."""
    blocks: tuple[int, ...] = ()
    """auto-lg: the inherited blocks by number, from 0; empty to choose `inherit` of them on the data."""
    sigma_share: float = 0.2
    """fine: first share of the steps, in which of the matrices only sigma trains."""

    def __post_init__(self) -> None:
        used = ("method", *SETTINGS[self.method])
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if setting.name not in used and value != setting.default:
                raise UsageError(
                    f"{setting.name} is {value!r} and {self.method} has no such setting; leave it out."
                )
        if self.rank < 1:
            raise UsageError(f"rank is {self.rank}; it must be at least 1.")
        if self.method == "hra" and self.rank % 2:
            raise UsageError(
                f"rank is {self.rank}; hra starts as its base with an even number of reflections only."
            )
        if self.alpha < 0:
            raise UsageError(f"alpha is {self.alpha}; it must be 0 or more.")
        if self.inherit < 1:
            raise UsageError(f"inherit is {self.inherit}; it must be at least 1.")
        if len(set(self.blocks)) != len(self.blocks) or min(self.blocks, default=0) < 0:
            raise UsageError(f"blocks is {self.blocks}; name each block once, counted from 0.")
        if not 0 <= self.sigma_share < 1:
            raise UsageError(
                f"sigma_share is {self.sigma_share}; it is a share of the steps, from 0 to below 1."
            )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Learning new classes with a rival, from a dense model."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source="avatars:novel"))
    rival: RivalConfig = field(default_factory=RivalConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500, lr=4e-3, save_every=250))
