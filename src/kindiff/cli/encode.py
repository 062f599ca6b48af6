"""kindiff encode"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from kindiff.config import EncodeConfig


@dataclass(frozen=True, kw_only=True)
class Args:
    """Turn images into latents that `kindiff pretrain --data.source OUT` trains on; run again to go on."""

    out: tyro.conf.Positional[Path]
    """Directory to write: the latents and the autoencoder."""
    config: Path | None = None
    """Recipe (TOML) whose values the options below override."""
    recipe: Annotated[EncodeConfig, tyro.conf.arg(name="")] = field(default_factory=EncodeConfig)


def run(args: Args) -> None:
    """Train the autoencoder where none is given, encode."""
    from kindiff.train.encoding import encode

    encode(args.recipe, args.out)
    print(args.out)
