"""kindiff adapt"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from kindiff.config import AdaptConfig


@dataclass(frozen=True, kw_only=True)
class Args:
    """Teach a dense model new classes with a method that KIND is compared with; run again to resume."""

    model: tyro.conf.Positional[Path]
    """Directory of a dense model (from `kindiff pretrain --method dense`)."""
    out: tyro.conf.Positional[Path]
    """Run directory; the merged model of the new classes is OUT/model, what trained OUT/adapter."""
    config: Path | None = None
    """Recipe (TOML) whose values the options below override."""
    recipe: Annotated[AdaptConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptConfig)


def run(args: Args) -> None:
    """Train the rival."""
    from kindiff.train import adapt

    adapt(args.model, args.recipe, args.out)
    print(args.out / "model")
