"""kindiff pretrain"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from kindiff.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Args:
    """Pre-train a decomposable diffusion transformer on images; run again to resume."""

    out: tyro.conf.Positional[Path]
    """Run directory; the finished model is OUT/model."""
    config: Path | None = None
    """Recipe (TOML) whose values the options below override."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check everything, time a few steps, print the plan (parameters, GMACs, memory, time), train nothing."""
    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)


def run(args: Args) -> None:
    """Train, or print the plan."""
    from kindiff.progress import show
    from kindiff.train import pretrain
    from kindiff.train.plan import pretrain_plan

    if args.dry_run:
        show(pretrain_plan(args.recipe).text())
        return
    pretrain(args.recipe, args.out)
    show(args.out / "model")
