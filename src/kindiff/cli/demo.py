"""kindiff demo"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """The whole story on drawn avatars, on two cores in a quarter of an hour: pre-train on the base classes,
    decompose, recombine two smaller models, teach the novel classes from a few images each, sample, and write a
    page to look at. Run again to go on where it was."""

    out: tyro.conf.Positional[Path] = Path("runs/demo")
    """Directory of everything the demo makes; the page is OUT/index.html."""
    size: Literal["standard", "smoke"] = "standard"
    """smoke: the same steps on a toy model in under a minute, to see that everything runs (pictures are noise)."""
    open: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Open the page in a browser at the end."""


def run(args: Args) -> None:
    """Every step looks first whether its result is there."""
    from kindiff.progress import say
    from kindiff.study.demo import DEMOS, run_demo

    started = time.monotonic()
    page = run_demo(args.out, DEMOS[args.size])
    say(f"the demo took {(time.monotonic() - started) / 60:.1f} minutes in this call")
    print(page.resolve())
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
