"""Samples that a model draws while they are evaluated; they are never all in memory.

Shapes: N images, B images of a batch, H/W height and width.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from kindiff.checkpoint import sha256
from kindiff.classes import ClassSet
from kindiff.config import SampleConfig
from kindiff.errors import UsageError
from kindiff.evaluate.images import LOSSLESS
from kindiff.evaluate.run import SamplerInfo
from kindiff.evaluate.store import digest
from kindiff.pipeline import DiTPipeline, sampler_of
from kindiff.runtime import settled


class GeneratedImages:
    """N samples of a model directory: image i is of class i mod C and depends on i alone.

    count 0 stands for per_class of each class. Raises UsageError for fewer images than classes.
    """

    encoding = LOSSLESS
    class_order = False

    def __init__(
        self,
        model: Path,
        count: int,
        config: SampleConfig,
        *,
        classes: tuple[str, ...] = (),
        per_class: int = 50,
    ) -> None:
        self.pipeline = DiTPipeline.from_pretrained(model)
        self.pipeline.check_draws_pictures()
        known: ClassSet = self.pipeline.model.classes
        self.classes: ClassSet | None = ClassSet(classes) if classes else known
        self.name = str(model)
        count = count or per_class * len(self.classes)
        if count < len(self.classes):
            raise UsageError(f"{count} samples are fewer than the {len(self.classes)} classes; draw more.")
        self.config = config = settled(config)
        self.ids = [known.ids(self.classes.names)[i % len(self.classes)] for i in range(count)]
        self.labels: np.ndarray | None = np.arange(count) % len(self.classes)
        first = self.read(0, 1)
        self.size: tuple[int, int] = (first.shape[1], first.shape[2])
        drawn = {key: value for key, value in asdict(config).items() if key not in ("batch", "device")}
        files = {
            path.relative_to(model).as_posix(): sha256(path)
            for path in sorted(model.rglob("*"))
            if path.is_file()
        }
        self.sha256 = digest([files, drawn, count, self.ids[: len(self.classes)]])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.pipeline.sample(self.ids[start:stop], self.config, first_index=start)

    @property
    def sampler(self) -> SamplerInfo:
        """How they are drawn, for the protocol."""
        name = sampler_of(self.pipeline.model, self.config)
        spaced = self.pipeline.model.config.objective == "epsilon"
        return SamplerInfo(
            sampler=f"{name}, {self.config.spacing}" if spaced else name,
            steps=self.config.steps,
            guidance=self.config.guidance,
            precision=self.config.precision,
            ema=True,  # what training writes as a model is the moving average
            seed=self.config.seed,
        )
