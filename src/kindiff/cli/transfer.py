"""kindiff transfer"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from kindiff.config import TransferConfig


@dataclass(frozen=True, kw_only=True)
class Args:
    """Teach parts new classes: learngenes frozen, fresh tailors; run again to resume."""

    parts: tyro.conf.Positional[Path]
    """Components directory (from `kindiff decompose`)."""
    out: tyro.conf.Positional[Path]
    """Run directory; the model of the new classes is OUT/model."""
    config: Path | None = None
    """Recipe (TOML) whose values the options below override."""
    recipe: Annotated[TransferConfig, tyro.conf.arg(name="")] = field(default_factory=TransferConfig)


def run(args: Args) -> None:
    """Train the tailors."""
    from kindiff.progress import show
    from kindiff.train import transfer

    transfer(args.parts, args.recipe, args.out)
    show(args.out / "model")
