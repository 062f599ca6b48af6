"""kindiff report"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write one self-contained HTML page about a training run (its course, samples, components) or a study (who won,
    tables, figures, samples side by side)."""

    path: tyro.conf.Positional[Path]
    """Folder of a run or of a study."""
    out: Path | None = None
    """The file; report.html in that folder when not given."""
    work: Path = Path("runs/studies")
    """Working folder of a study, where its models are; without them the page has no pictures."""
    open: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the page in a browser when it is done."""


def run(args: Args) -> None:
    """Write the page; prints its path."""
    from kindiff.study.report import write_report

    page = write_report(args.path, out=args.out, work=args.work)
    print(page.resolve())
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
