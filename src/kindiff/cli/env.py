"""kindiff env"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Versions, hardware, the kernels for the CPU and the cache folder: what a bug report needs."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""


def run(args: Args) -> None:
    """Print what is known of this machine."""
    from kindiff import runtime
    from kindiff.native import compiled

    facts = runtime.versions() | runtime.hardware()
    facts["precision"] = runtime.precision_on(runtime.device_of("auto"), "auto")
    kernels, where = compiled.found()
    facts["kernels"] = where if kernels else f"torch's operations: {where}"
    facts["cache"] = str(runtime.cache_folder())
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(f"{name:<12} {value}" for name, value in facts.items()))
