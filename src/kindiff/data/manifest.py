"""The manifest of a prepared set: what it must hold, checked before anything of that size is allocated."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kindiff.classes import ClassSet
from kindiff.errors import BadFileError, UsageError

MANIFEST = "manifest.json"
FORMAT = 1
MAX_SIDE = 16384
MAX_IMAGES = 2**40


@dataclass(frozen=True)
class Skipped:
    """A file that was left out of a prepared set."""

    file: str
    """Path below the image folder."""
    reason: str
    """Why it could not be read."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The checked content of `manifest.json`."""

    size: int
    classes: ClassSet
    counts: tuple[int, ...]
    class_sha256: tuple[str, ...]
    images_sha256: str
    images_bytes: int
    sha256: str
    source: str
    skipped: tuple[Skipped, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `manifest.json`."""
        classes = zip(self.classes.names, self.counts, self.class_sha256, strict=True)
        return {
            "format": FORMAT,
            "kind": "images",
            "size": self.size,
            "classes": [{"name": n, "count": c, "sha256": h} for n, c, h in classes],
            "files": {"images.npy": {"bytes": self.images_bytes, "sha256": self.images_sha256}},
            "sha256": self.sha256,
            "source": self.source,
            "skipped": [{"file": s.file, "reason": s.reason} for s in self.skipped],
        }

    @staticmethod
    def read(directory: Path) -> Manifest:
        """The manifest of a prepared set; FileNotFoundError without one, BadFileError for a wrong one."""
        from kindiff.checkpoint import read_json

        file = directory / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{directory} has no {MANIFEST}; it is no prepared set.")
        values = read_json(file)
        try:
            return _parse(values)
        except (_WrongError, UsageError) as error:
            raise BadFileError(f"{file} is not a valid manifest: {error}") from None


def content_hash(size: int, names: Sequence[str], counts: Sequence[int], class_sha256: Sequence[str]) -> str:
    """SHA-256 of a set's content: side, class names, counts and the hash of each class's pixels."""
    content = {"size": size, "classes": [list(c) for c in zip(names, counts, class_sha256, strict=True)]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _WrongError(ValueError):
    """What is wrong with a manifest, as the end of a sentence."""


def _parse(values: dict[str, Any]) -> Manifest:
    if values.get("format") != FORMAT or values.get("kind") != "images":
        raise _WrongError(
            f"its format is {values.get('format')!r} of kind {values.get('kind')!r}; this version reads "
            f"format {FORMAT} of kind 'images'. Prepare the set again."
        )
    entries = _of_type(values, "classes", list)
    if not all(isinstance(entry, dict) for entry in entries):
        raise _WrongError("an entry of classes is no object.")
    counts = tuple(_whole(entry, "count", MAX_IMAGES) for entry in entries)
    hashes = tuple(_sha256(entry, "sha256") for entry in entries)
    classes = ClassSet(tuple(_of_type(entry, "name", str) for entry in entries))
    files = _of_type(values, "files", dict)
    if set(files) != {"images.npy"} or not isinstance(files["images.npy"], dict):
        raise _WrongError(f"files must be images.npy alone, not {sorted(files)}.")
    size = _whole(values, "size", MAX_SIDE)
    skipped = _of_type(values, "skipped", list)
    if not all(isinstance(entry, dict) for entry in skipped):
        raise _WrongError("an entry of skipped is no object.")
    sha256 = _sha256(values, "sha256")
    if sha256 != content_hash(size, classes.names, counts, hashes):
        raise _WrongError("its sha256 does not follow from its classes; it was damaged or edited.")
    return Manifest(
        size=size,
        classes=classes,
        counts=counts,
        class_sha256=hashes,
        images_sha256=_sha256(files["images.npy"], "sha256"),
        images_bytes=_whole(files["images.npy"], "bytes", 2**62),
        sha256=sha256,
        source=_of_type(values, "source", str),
        skipped=tuple(Skipped(_of_type(s, "file", str), _of_type(s, "reason", str)) for s in skipped),
    )


def _of_type(values: dict[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _WrongError(f"{key} is {str(value)[:60]!r}, which is no {kind.__name__}.")
    return value


def _whole(values: dict[str, Any], key: str, largest: int) -> int:
    value: int = _of_type(values, key, int)
    if not 1 <= value <= largest:
        raise _WrongError(f"{key} is {value}; it must be 1 to {largest}.")
    return value


def _sha256(values: dict[str, Any], key: str) -> str:
    value: str = _of_type(values, key, str)
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise _WrongError(f"{key} is {value[:80]!r}, which is no SHA-256.")
    return value
