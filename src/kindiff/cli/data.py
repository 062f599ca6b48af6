"""kindiff data"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Look through a folder of images once. Files that are empty, truncated, no image, of a mode or size that cannot
    be used, or that stand twice are printed and written to its quarantine list, which training leaves out."""

    action: tyro.conf.Positional[Literal["check"]]
    """check: the only one."""
    folder: tyro.conf.Positional[Path]
    """Image folder: one sub-folder a class."""
    out: Path | None = None
    """Write the list here instead of FOLDER/quarantine.json (training reads only that)."""
    keep_duplicates: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Files with the same bytes are no fault."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""


def run(args: Args) -> None:
    """Print the list, a file a line, and the count to stderr."""
    from kindiff.data.folder import check_folder
    from kindiff.progress import say

    bad, checked = check_folder(args.folder, out=args.out, duplicates=not args.keep_duplicates)
    if args.json:
        entries = [dataclasses.asdict(entry) for entry in bad]
        print(json.dumps({"checked": checked, "files": entries}, indent=1))
    else:
        for entry in bad:
            print(f"{entry.file}\t{entry.reason}")
    say(f"{len(bad)} of {checked} files are left out of training")
