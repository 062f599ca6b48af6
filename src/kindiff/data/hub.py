"""Hugging Face data sets as sources of images.

N rows of the data set.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from kindiff.classes import ClassSet, shorten
from kindiff.config import DataConfig
from kindiff.data.cache import made_once
from kindiff.data.folder import note, sum_up, unreadable
from kindiff.data.hub_rows import labels, opened
from kindiff.data.pieces import Source, labelled
from kindiff.data.prepared import ImageSet, open_prepared, write_prepared
from kindiff.errors import UsageError
from kindiff.progress import Track
from kindiff.runtime import cache_folder

_PIECE = 64
FEW = 512
"""Up to so many images are decoded in this process."""


def open_hub(config: DataConfig) -> Source:
    """The images of a data set, its classes in their order, those of a class in the order of the rows.

    Raises as `hub_rows.opened` and `hub_rows.labels`, or UsageError for an unknown or empty class.
    """
    reference = config.source
    data, _, _ = opened(reference)
    names, labels_N = labels(reference)
    wanted = ClassSet(tuple(config.classes) or names)
    rows = [np.flatnonzero(labels_N == i)[config.of_class] for i in ClassSet(names).ids(wanted.names)]
    if empty := [name for name, own in zip(wanted.names, rows, strict=True) if not len(own)]:
        later = f" from image {config.first} on" if config.first else ""
        raise UsageError(
            f"{reference} has no images of class {shorten(empty)}{later}; leave them out with data.classes."
        )
    described = [data._fingerprint, config.size, wanted.names, config.per_class, config.first]
    return Source(
        classes=wanted, labels=labelled([len(own) for own in rows]), size=config.size,
        identity=hashlib.sha256(json.dumps(described).encode()).hexdigest(), reader="hub", where=reference,
        items=np.concatenate(rows),
    )  # fmt: skip


def open_hub_images(config: DataConfig) -> ImageSet:
    """The same images, decoded once into the cache. Raises as open_hub, or UsageError for an unreadable class."""
    source = open_hub(config)
    target = cache_folder() / "hub" / f"{config.size}px-{source.identity[:16]}"
    images = open_prepared(made_once(target, lambda path: _decode(path, source, config.strict)))
    if images.skipped and config.strict:
        raise unreadable(f"{source.where}, {images.skipped[0].file},", images.skipped[0].reason)
    return images


def _decode(target: Path, source: Source, strict: bool) -> None:
    from kindiff.data.manifest import Skipped
    from kindiff.data.workers import ordered_map

    ends = np.cumsum(np.bincount(source.labels, minlength=len(source.classes)))
    starts = [
        (name, at, min(at + _PIECE, int(end)))
        for name, first, end in zip(source.classes.names, [0, *ends[:-1]], ends, strict=True)
        for at in range(int(first), int(end), _PIECE)
    ]
    skipped: list[Skipped] = []
    lacking = dict.fromkeys(source.classes.names)

    def chunks() -> Any:
        tasks = [source.piece(start, stop) for _, start, stop in starts]
        with Track(f"decoding {source.where}", len(source), unit="images") as track:
            workers = 1 if len(source) <= FEW else 0  # starting others takes longer
            read = ordered_map("kindiff.data.pieces:read_piece", tasks, workers=workers)
            for (name, start, stop), (faults, pixels) in zip(starts, read, strict=True):
                for _, item, reason in faults:
                    fault = Skipped(f"row {item}", reason)
                    note(skipped, fault, f"{source.where}, {fault.file},", strict)
                chunk = np.frombuffer(pixels, np.uint8).reshape(-1, source.size, source.size, 3)
                if len(chunk):
                    lacking.pop(name, None)
                    yield name, chunk
                track.advance(stop - start)
        if lacking:
            raise UsageError(
                f"{source.where} has no readable image of class {shorten(lacking)}; leave them out with data.classes."
            )

    write_prepared(target, chunks(), size=source.size, source=source.where, skipped=skipped)
    sum_up(skipped, target)
