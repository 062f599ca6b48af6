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
    be used, or that stand twice are printed and written to its quarantine list, which training leaves out.

    Of latents (`kindiff encode`), every shard is compared with its recorded hash; a damaged one is named, exit code 1.
    """

    action: tyro.conf.Positional[Literal["check"]]
    """check: the only one."""
    folder: tyro.conf.Positional[Path]
    """Image folder, one sub-folder a class; or a directory of latents."""
    out: Path | None = None
    """Write the list here instead of FOLDER/quarantine.json (training reads only that)."""
    keep_duplicates: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Files with the same bytes are no fault."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""


def run(args: Args) -> None:
    """Print the list, a file a line, and the count to stderr."""
    from kindiff.data.folder import check_folder
    from kindiff.data.latents import is_latents
    from kindiff.errors import UsageError
    from kindiff.progress import say

    if is_latents(args.folder):
        if args.out or args.keep_duplicates:
            raise UsageError(
                "latents have no quarantine list and no duplicates; --out and --keep-duplicates are for images."
            )
        _check_latents(args.folder, as_json=args.json)
        return
    bad, checked = check_folder(args.folder, out=args.out, duplicates=not args.keep_duplicates)
    if args.json:
        entries = [dataclasses.asdict(entry) for entry in bad]
        print(json.dumps({"checked": checked, "files": entries}, indent=1))
    else:
        for entry in bad:
            print(f"{entry.file}\t{entry.reason}")
    say(f"{len(bad)} of {checked} files are left out of training")


def _check_latents(folder: Path, *, as_json: bool) -> None:
    from kindiff.data.latent_manifest import LatentManifest
    from kindiff.data.latents import damaged_shards
    from kindiff.errors import BadFileError
    from kindiff.progress import say

    shards = LatentManifest.read(folder).shards
    bad = damaged_shards(folder, shards)
    if as_json:
        print(json.dumps({"checked": len(shards), "faults": bad}, indent=1))
    if bad:
        raise BadFileError(
            "\n".join(bad) if not as_json else f"{len(bad)} of {len(shards)} shards are damaged."
        )
    say(f"{len(shards)} shards are whole")
