"""kindiff replay"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Run a step again that was not taken because a number was not finite, and say what is wrong with it."""

    capsule: tyro.conf.Positional[Path]
    """The step's capsule: RUN/capsules/step-<n>."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""


def run(args: Args) -> None:
    """Print what was found."""
    from kindiff.train.capsule import replay

    facts = replay(args.capsule)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"{name:<36}{value if value != [] else 'none'}")
