"""Hugging Face data sets as sources of images: `hf:NAME[:SPLIT]`, or a directory that `save_to_disk` wrote.

N rows of the data set.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from kindiff.classes import ClassSet, shorten
from kindiff.config import DataConfig
from kindiff.data.cache import made_once
from kindiff.data.prepared import ImageSet, open_prepared, write_prepared
from kindiff.data.sources import Source, labelled
from kindiff.errors import BadFileError, UsageError
from kindiff.progress import Track
from kindiff.runtime import cache_folder

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")
_PIECE = 64
FEW = 512
"""Up to so many images are decoded in this process."""


def is_hub(source: str) -> bool:
    """Whether a source names a Hugging Face data set."""
    return source.startswith(PREFIX) or any((Path(source).expanduser() / name).is_file() for name in _SAVED)


def open_hub(config: DataConfig) -> Source:
    """The images of a data set, its classes in their order, those of a class in the order of the rows.

    The one column of images and the one of class labels are found by their types; a column of text counts as labels
    too where there is none. UsageError for columns that do not fit, an unknown class or split, BadFileError for a
    damaged data set, ImportError says what to install.
    """
    reference = config.source
    data, _, column = _opened(reference)
    names, labels_N = _labels(data, column, reference)
    wanted = ClassSet(tuple(config.classes) or names)
    rows = [
        np.flatnonzero(labels_N == i)[: config.per_class or None] for i in ClassSet(names).ids(wanted.names)
    ]
    if empty := [name for name, own in zip(wanted.names, rows, strict=True) if not len(own)]:
        raise UsageError(
            f"{reference} has no images of class {shorten(empty)}; leave them out with data.classes."
        )
    described = [data._fingerprint, config.size, wanted.names, config.per_class]
    return Source(
        classes=wanted, labels=labelled([len(own) for own in rows]), size=config.size,
        identity=hashlib.sha256(json.dumps(described).encode()).hexdigest(), reader="hub", where=reference,
        items=np.concatenate(rows),
    )  # fmt: skip


def open_hub_images(config: DataConfig) -> ImageSet:
    """The same images, decoded once into the cache. Raises as open_hub, or UsageError for an unreadable class."""
    source = open_hub(config)
    target = cache_folder() / "hub" / f"{config.size}px-{source.identity[:16]}"
    return open_prepared(made_once(target, lambda path: _decode(path, source, config.strict)))


def image_bytes(reference: str, row: int) -> bytes:
    """The encoded image of a row."""
    data, column, _ = _opened(reference)
    value = data[row][column]
    if value is None:
        return b""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


@functools.lru_cache(maxsize=2)
def _opened(reference: str) -> tuple[Any, str, str]:
    """The data set, its column of images (as bytes) and its column of labels."""
    try:
        import datasets
    except ImportError:
        raise ImportError("datasets is not installed; pip install 'kindiff[hf]'.") from None
    name, _, split = reference.removeprefix(PREFIX).partition(":")
    folder = Path(name).expanduser()
    try:
        if folder.exists():
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise BadFileError(f"data set {name} cannot be opened: {lines[0][:200]}") from None
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise UsageError(
                f"data set {name} has no split {split or 'train'!r}; give one of {shorten(data)}: hf:{name}:SPLIT."
            )
        data = data[split or "train"]
    elif split and folder.exists():
        raise UsageError(f"{name} is one split by itself, so {split!r} cannot be picked from it.")
    image = _column(data, reference, "images", [datasets.Image])
    texts = [c for c, f in data.features.items() if getattr(f, "dtype", "") == "string"]
    has_labels = any(isinstance(feature, datasets.ClassLabel) for feature in data.features.values())
    label = _column(data, reference, "labels", [datasets.ClassLabel], () if has_labels else texts)
    return data.cast_column(image, datasets.Image(decode=False)), image, label


def _column(data: Any, reference: str, what: str, types: list[type], others: Any = ()) -> str:
    found = [c for c, feature in data.features.items() if isinstance(feature, tuple(types))] + list(others)
    if len(found) != 1:
        raise UsageError(
            f"data set {reference} has {len(found)} columns of {what} among {shorten(data.features)}; it must have "
            "one (`select_columns`, `cast_column` and `save_to_disk` make such a copy)."
        )
    return found[0]


def _labels(data: Any, column: str, reference: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and (N,) the class number of each row."""
    values = data.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    if any(value is None for value in values):
        raise UsageError(f"data set {reference} has rows without a label in {column!r}; filter them out.")
    feature = data.features[column]
    if hasattr(feature, "names"):
        names = tuple(feature.names)
        if not names or not 0 <= min(values, default=0) <= max(values, default=0) < len(names):
            raise UsageError(
                f"data set {reference} has labels {min(values)} to {max(values)} and {len(names)} class names; give a "
                "labelled split."
            )
        return names, np.array(values, dtype=np.int64)
    names = tuple(sorted(set(values)))
    places = {name: i for i, name in enumerate(names)}
    return names, np.array([places[value] for value in values], dtype=np.int64)


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

    def chunks() -> Any:
        tasks = [source.piece(start, stop) for _, start, stop in starts]
        with Track(f"decoding {source.where}", len(source), unit="images") as track:
            workers = 1 if len(source) <= FEW else 0  # starting others takes longer
            read = ordered_map("kindiff.data.sources:read_piece", tasks, workers=workers)
            for (name, start, stop), (faults, pixels) in zip(starts, read, strict=True):
                skipped.extend(Skipped(f"row {item}", reason) for _, item, reason in faults)
                if faults and strict:
                    raise BadFileError(
                        f"{source.where}: row {faults[0][1]} is no readable image: {faults[0][2]}."
                    )
                chunk = np.frombuffer(pixels, np.uint8).reshape(-1, source.size, source.size, 3)
                if len(chunk):
                    yield name, chunk
                track.advance(stop - start)

    write_prepared(target, chunks(), size=source.size, source=source.where, skipped=skipped)
