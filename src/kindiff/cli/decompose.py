"""kindiff decompose"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Take a model apart: config.json, learngenes.safetensors, tailors/<class>.safetensors."""

    model: tyro.conf.Positional[Path]
    """Model directory (from `kindiff pretrain` or `kindiff transfer`: RUN/model)."""
    out: tyro.conf.Positional[Path]
    """Components directory to write."""


def run(args: Args) -> None:
    """Read, take apart, write."""
    from kindiff.components import decompose, save_components
    from kindiff.pipeline import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(args.model)
    save_components(decompose(pipeline.model), args.out, autoencoder=pipeline.autoencoder)
    print(args.out)
