"""Images that are read piece by piece, in any process: nothing is decoded ahead.

N images of the source, n of a piece, H W height and width.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kindiff.classes import ClassSet
from kindiff.data.decode import UnreadableError, decode
from kindiff.data.hub_rows import image_bytes
from kindiff.data.prepared import open_prepared


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


def labelled(counts: Sequence[int]) -> np.ndarray:
    """(N,) int64 labels of classes with these counts, side by side."""
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def _opened(reader: str, where: str, item: Any) -> Any:
    if reader == "files":
        return Path(where, item)
    return io.BytesIO(image_bytes(where, item))


@functools.lru_cache(maxsize=4)
def _rows(where: str) -> np.ndarray:
    return open_prepared(Path(where), verify=False).stored


def _plain(item: Any) -> Any:
    return item if isinstance(item, str) else int(item)
