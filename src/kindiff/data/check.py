"""Looking through an image folder once: what cannot be read, or stands twice, goes on a list that training leaves out.

The list, quarantine.json in the folder, names files; the images that are left and their order follow from the folder
and the list alone.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kindiff.data.manifest import Skipped
from kindiff.data.workers import ordered_map
from kindiff.errors import BadFileError
from kindiff.progress import Track

QUARANTINE = "quarantine.json"
_PER_TASK = 64
_SIDE = 64
"""Files are decoded as for training at this size."""


def check_files(folder: Path, files: list[str], *, duplicates: bool = True) -> list[Skipped]:
    """The files (paths below `folder`) that training should not see, each with the reason, in their order.

    duplicates: of files with the same bytes all but the first are named too.
    """
    folder = folder.absolute()
    tasks = [[str(folder), _SIDE, files[i : i + _PER_TASK]] for i in range(0, len(files), _PER_TASK)]
    bad: list[Skipped] = []
    first: dict[str, str] = {}
    with Track(f"checking {folder.name}", len(files), unit="files") as track:
        for facts, _ in ordered_map("kindiff.data.decode:check_chunk", tasks):
            for file, sha256, fault in facts:
                if fault:
                    bad.append(Skipped(file, fault))
                elif first.setdefault(sha256, file) != file and duplicates:
                    bad.append(Skipped(file, f"duplicate: the same bytes as {first[sha256]}"))
            track.advance(len(facts))
    return bad


def write_quarantine(path: Path, bad: list[Skipped], *, checked: int) -> None:
    """Write the list, replacing an older one."""
    from kindiff.checkpoint import write_json

    content = {"format": 1, "kind": "quarantine", "checked": checked, "files": [asdict(s) for s in bad]}
    write_json(path, content)


def read_quarantine(path: Path) -> list[Skipped]:
    """The list at `path`, empty when there is none; BadFileError when it is damaged."""
    from kindiff.checkpoint import read_json

    if not path.is_file():
        return []
    content = read_json(path)
    entries = content.get("files")
    sound = content.get("kind") == "quarantine" and content.get("format") == 1 and isinstance(entries, list)
    if not sound or not all(_sound(entry) for entry in entries or ()):
        raise BadFileError(f"{path} is damaged; make it again with `kindiff data check`.")
    return [Skipped(**entry) for entry in entries or ()]


def _sound(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"file", "reason"}:
        return False
    return all(isinstance(value, str) for value in entry.values())
