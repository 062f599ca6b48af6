"""What a run would do, without doing it."""

from __future__ import annotations

from kindiff.config import PretrainConfig
from kindiff.data import open_samples
from kindiff.train.pretraining import new_model


def pretrain_plan(config: PretrainConfig) -> str:
    """Model, data and steps of a pre-training run in words; raises what the run itself would raise at its start."""
    samples = open_samples(config.data)
    model = new_model(config, samples)
    count = sum(p.numel() for p in model.parameters())
    seen = config.train.steps * config.train.batch
    return "\n".join(
        [
            f"data       {len(samples):,} samples of {len(samples.classes)} classes, {samples.size} x {samples.size}",
            f"model      {config.method}, {count:,} parameters, {model.config.tokens} tokens",
            f"training   {config.train.steps:,} steps of {config.train.batch}: {seen:,} images, "
            f"{seen / len(samples):.1f} epochs",
        ]
    )
