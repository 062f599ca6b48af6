"""An image folder, one sub-folder a class, decoded once into a prepared set in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kindiff.classes import ClassSet
from kindiff.data.cache import made_once
from kindiff.data.check import QUARANTINE, check_files, read_quarantine, write_quarantine
from kindiff.data.manifest import MAX_SIDE, Skipped
from kindiff.data.prepared import ImageSet, open_prepared, write_prepared
from kindiff.data.workers import ordered_map
from kindiff.errors import BadFileError, UsageError
from kindiff.progress import Track
from kindiff.runtime import cache_folder

_DECODING = 1  # raise when decoding changes, so that no old cache is taken for new
_CHUNK_FILES = 64
_CHUNK_BYTES = 16 * 2**20
_NAMED = 10
"""Skipped files named on stderr; the manifest has all of them."""


def open_folder(folder: Path, *, size: int, classes: Iterable[str] = (), strict: bool = False) -> ImageSet:
    """The images of `folder`/<class>/**, sorted by name, scaled and centre-cropped to size x size.

    Decoded on first use into the cache; the cache is used again while every file's name, size and time of
    change are the same. classes: only these, in this order (empty: every sub-folder, sorted). Hidden files
    and folders are left alone, and so are the files that quarantine.json lists. A file that is no readable
    image is named on stderr, counted and skipped, or, if `strict`, BadFileError. Raises FileNotFoundError for
    a missing folder, UsageError for a folder without classes, an unknown class, or a class without a readable
    image.
    """
    if not 1 <= size <= MAX_SIDE:
        raise UsageError(f"size is {size}; it must be 1 to {MAX_SIDE} pixels.")
    folder = folder.absolute()
    files = list_folder(folder, classes)
    target = _directory(folder, size, files)
    made = made_once(target, lambda path: _decode_set(path, folder, size, files, strict))
    images = open_prepared(made)
    if images.skipped and strict:
        raise unreadable(f"{folder / images.skipped[0].file}", images.skipped[0].reason)
    return images


def list_folder(folder: Path, classes: Iterable[str] = ()) -> dict[str, list[tuple[str, int, int]]]:
    """Class -> (path below the class folder, bytes, time of change in ns) of its files, without those that
    quarantine.json lists. Raises as open_folder does, before anything is decoded."""
    found = ClassSet(_class_folders(folder))
    names = tuple(classes) or found.names
    found.ids(names)
    left_out = {entry.file for entry in read_quarantine(folder / QUARANTINE)}
    files = {}
    for name in names:
        present = _files(folder / name)
        if not present:
            raise UsageError(f"class folder {folder / name} has no images; add some or remove the folder.")
        files[name] = [facts for facts in present if f"{name}/{facts[0]}" not in left_out]
        _require(len(files[name]), folder / name)
    return files


def check_folder(
    folder: Path, *, out: Path | None = None, duplicates: bool = True
) -> tuple[list[Skipped], int]:
    """Look through every file of an image folder and write its quarantine list (to `out`, else into the folder).

    Returns what was found and the number of files looked at. FileNotFoundError, UsageError as open_folder.
    """
    folder = folder.absolute()
    listed = [f"{name}/{path}" for name in _class_folders(folder) for path, _, _ in _files(folder / name)]
    bad = check_files(folder, listed, duplicates=duplicates)
    write_quarantine(out or folder / QUARANTINE, bad, checked=len(listed))
    return bad, len(listed)


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"image folder {folder} {kind}; give a folder with one sub-folder a class.")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UsageError(
            f"image folder {folder} has no sub-folders; the layout is <folder>/<class>/<image>, for example "
            f"{folder.name}/owl/1.jpg."
        )
    return tuple(names)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """(path below the class folder, bytes, time of change in ns) of every file that is not hidden, sorted."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or (path.exists() and not path.is_file()):
                continue
            # A dangling link is kept: decoding will name it.
            stat = path.stat() if path.exists() else path.lstat()
            found.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _directory(folder: Path, size: int, files: dict[str, list[tuple[str, int, int]]]) -> Path:
    described = json.dumps([_DECODING, str(folder), size, list(files.items())])
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in folder.name)[:60]
    return cache_folder() / "folders" / f"{name}-{size}px-{key}"


def _decode_set(
    target: Path, folder: Path, size: int, files: dict[str, list[tuple[str, int, int]]], strict: bool
) -> None:
    per_task = max(1, min(_CHUNK_FILES, _CHUNK_BYTES // (size * size * 3)))
    tasks: list[tuple[str, str, int, list[str]]] = []
    for name, listed in files.items():
        paths = [f"{name}/{path}" for path, _, _ in listed]
        tasks += [(name, str(folder), size, paths[i : i + per_task]) for i in range(0, len(paths), per_task)]
    skipped: list[Skipped] = []

    def images() -> Iterator[tuple[str, np.ndarray]]:
        last, readable = tasks[0][0], 0
        with Track(f"decoding {folder.name}", sum(len(t[3]) for t in tasks), unit="images") as track:
            decoded = ordered_map("kindiff.data.decode:decode_chunk", tasks)
            for (name, _, _, paths), (faults, pixels) in zip(tasks, decoded, strict=True):
                if name != last:
                    _require(readable, folder / last)
                    last, readable = name, 0
                for file, reason in faults:
                    note(skipped, Skipped(file, reason), f"{folder / file}", strict)
                chunk = np.frombuffer(pixels, dtype=np.uint8).reshape(-1, size, size, 3)
                readable += len(chunk)
                if len(chunk):
                    yield name, chunk
                track.advance(len(paths))
        _require(readable, folder / last)

    write_prepared(target, images(), size=size, source=f"image folder {folder}", skipped=skipped)
    sum_up(skipped, target)


def _require(readable: int, folder: Path) -> None:
    if not readable:
        raise UsageError(f"class folder {folder} has no readable image; mend its files or remove the folder.")


def note(skipped: list[Skipped], fault: Skipped, item: str, strict: bool) -> None:
    """An image that cannot be read goes on the list, the first ones by name on stderr; BadFileError if `strict`."""
    if strict:
        raise unreadable(item, fault.reason)
    skipped.append(fault)
    if len(skipped) <= _NAMED:
        print(f"kindiff: skipped {item}: {fault.reason}", file=sys.stderr)


def sum_up(skipped: list[Skipped], target: Path) -> None:
    """Say how many are on the list, where not all were named."""
    if len(skipped) > _NAMED:
        print(
            f"kindiff: {len(skipped)} files skipped in all; {target / 'manifest.json'} lists them.",
            file=sys.stderr,
        )


def unreadable(item: str, reason: str) -> BadFileError:
    """The error for such an image where none may be left out."""
    return BadFileError(f"{item} is no readable image: {reason}; mend or remove it.")
