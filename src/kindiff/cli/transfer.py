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
    """Components directory (from `kindiff decompose`); with --dry-run also the recipe of the pre-training that would
    make them."""
    out: tyro.conf.Positional[Path]
    """Run directory; the model of the new classes is OUT/model."""
    config: Path | None = None
    """Recipe (TOML) whose values the options below override."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check everything, time a few steps, print the plan (parameters, GMACs, memory, time), train nothing."""
    recipe: Annotated[TransferConfig, tyro.conf.arg(name="")] = field(default_factory=TransferConfig)


def run(args: Args) -> None:
    """Train the tailors, or print the plan."""
    from kindiff.progress import show
    from kindiff.train import transfer
    from kindiff.train.plan import transfer_plan

    if args.dry_run:
        show(transfer_plan(args.parts, args.recipe).text())
        return
    transfer(args.parts, args.recipe, args.out)
    show(args.out / "model")
