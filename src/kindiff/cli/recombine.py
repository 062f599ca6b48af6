"""kindiff recombine"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Put a model together from parts: the wanted classes, as many learngene components as the device allows."""

    parts: tyro.conf.Positional[Path]
    """Components directory."""
    out: tyro.conf.Positional[Path]
    """Model directory to write."""
    classes: tuple[str, ...] = ()
    """Wanted classes; none for all. Only their tailor files are read."""
    learngene_rank: int | None = None
    """Keep that many learngene components of every matrix (of the canonical form); all when not given."""
    tailor_rank: int | None = None
    """Keep that many components of every tailor, or all that it has; all when not given."""
    layers: Literal["auto", "factored", "dense", "merged"] = "auto"
    """factored: components. dense: learngenes as one weight. auto: the cheaper of the two. merged: one class in
    plain dense matrices, without the learngenes of its own that guidance uses."""


def run(args: Args) -> None:
    """Read the parts, build, write."""
    from kindiff.components import load_autoencoder, load_components
    from kindiff.pipeline import DiTPipeline

    parts = load_components(args.parts, args.classes or None)
    model = parts.recombine(
        learngene_rank=args.learngene_rank, tailor_rank=args.tailor_rank, layers=args.layers, take_over=True
    )
    DiTPipeline(model, load_autoencoder(args.parts)).save_pretrained(args.out)
    print(args.out)
