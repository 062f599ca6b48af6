"""kindiff push"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write a model card from the run and upload the model to the Hugging Face hub."""

    model: tyro.conf.Positional[Path]
    """Model directory (RUN/model)."""
    repository: tyro.conf.Positional[str]
    """NAME/MODEL on the hub."""
    run: Path | None = None
    """Run directory of the model, when it is not the folder above."""
    scores: Path | None = None
    """score.json of `kindiff evaluate --out`."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make a new repository private."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the card and print it; upload nothing."""


def run(args: Args) -> None:
    """Write the card, upload, print the address."""
    from kindiff.bridges.card import push_to_hub, write_card

    text = write_card(args.model, run=args.run, scores=args.scores)
    print(text if args.dry_run else push_to_hub(args.model, args.repository, private=args.private))
