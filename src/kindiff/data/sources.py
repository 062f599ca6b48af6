"""Images that are read piece by piece, in any process: what `kindiff encode` works through, nothing decoded ahead.

N images of the source, n of a piece, H W height and width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kindiff.classes import ClassSet
from kindiff.config import DataConfig
from kindiff.data.decode import UnreadableError, decode
from kindiff.data.manifest import MANIFEST
from kindiff.data.prepared import ImageSet, open_prepared
from kindiff.errors import UsageError


@dataclass(frozen=True, eq=False)
class Source:
    """N labelled images, those of a class side by side."""

    classes: ClassSet
    """The classes; labels are their ids."""
    labels: np.ndarray
    """(N,) int64 class ids, rising."""
    size: int
    """Side in pixels."""
    identity: str
    """Hash of what tells these images from others, without reading them through."""
    reader: Literal["files", "rows", "hub"]
    """How a piece is read."""
    where: str
    """Folder of the files, prepared set, or reference of the Hugging Face data set."""
    items: Sequence[Any] | np.ndarray
    """Of each image its path below the folder, or its row."""

    def __len__(self) -> int:
        return len(self.labels)

    def piece(self, start: int, stop: int) -> list[Any]:
        """Images start .. stop - 1 as plain values that `read_piece` takes in any process."""
        return [self.reader, self.where, self.size, [_plain(item) for item in self.items[start:stop]]]


def read_piece(piece: list[Any]) -> tuple[list[tuple[int, str, str]], bytes]:
    """(place in the piece, name, reason) of each unreadable image, and the pixels (n, H, W, 3) uint8 of the rest."""
    reader, where, size, items = piece
    faults: list[tuple[int, str, str]] = []
    if reader == "rows":
        return faults, _rows(where)[np.array(items, dtype=np.int64)].tobytes()
    pixels = []
    for place, item in enumerate(items):
        try:
            pixels.append(decode(_opened(reader, where, item), size).tobytes())
        except UnreadableError as error:
            faults.append((place, str(item), str(error)))
    return faults, b"".join(pixels)


def open_source(config: DataConfig) -> Source:
    """The images that a config asks for. Files of an image folder and a Hugging Face data set are not read yet;
    other images (avatars, groups of classes) are opened as training opens them. Raises what `open_images` raises.
    """
    from kindiff.data import hub, open_images

    path = Path(config.source).expanduser()
    plain = not config.groups and not config.source.startswith("avatars:") and not (path / MANIFEST).is_file()
    if plain and hub.is_hub(config.source):
        return hub.open_hub(config)
    if plain:
        return _folder(path, config)
    images: ImageSet = open_images(config)
    return Source(
        classes=images.classes, labels=images.labels, size=images.size, identity=images.sha256, reader="rows",
        where=str(images.path), items=images.rows,
    )  # fmt: skip


def renamed(source: Source, names: str) -> Source:
    """The same images, their classes called otherwise (see read_names; empty: as they are). UsageError when the
    counts differ."""
    from kindiff.data.hierarchy import read_names

    classes = read_names(names) if names else source.classes
    if len(classes) != len(source.classes):
        raise UsageError(
            f"names {names} has {len(classes)} classes and {source.where} {len(source.classes)}; give as many."
        )
    return dataclasses.replace(source, classes=classes)


def labelled(counts: Sequence[int]) -> np.ndarray:
    """(N,) int64 labels of classes with these counts, side by side."""
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def _folder(folder: Path, config: DataConfig) -> Source:
    from kindiff.data.folder import list_folder

    folder = folder.absolute()
    files = {
        name: listed[: config.per_class or None]
        for name, listed in list_folder(folder, config.classes).items()
    }
    described = json.dumps([config.size, list(files.items())])
    return Source(
        classes=ClassSet(tuple(files)), labels=labelled([len(listed) for listed in files.values()]),
        size=config.size, identity=hashlib.sha256(described.encode()).hexdigest(), reader="files",
        where=str(folder), items=[f"{name}/{file}" for name, listed in files.items() for file, _, _ in listed],
    )  # fmt: skip


def _opened(reader: str, where: str, item: Any) -> Any:
    if reader == "files":
        return Path(where, item)
    from kindiff.data.hub import image_bytes

    return io.BytesIO(image_bytes(where, item))


@functools.lru_cache(maxsize=4)
def _rows(where: str) -> np.ndarray:
    return open_prepared(Path(where), verify=False).stored


def _plain(item: Any) -> Any:
    return item if isinstance(item, str) else int(item)
