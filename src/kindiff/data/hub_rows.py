"""Hugging Face data sets, `hf:NAME[:SPLIT]` or a directory that `save_to_disk` wrote: their rows as they are.

N rows of the data set.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from kindiff.classes import shorten
from kindiff.errors import BadFileError, UsageError

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")


def is_hub(source: str) -> bool:
    """Whether a source names a Hugging Face data set."""
    return source.startswith(PREFIX) or any((Path(source).expanduser() / name).is_file() for name in _SAVED)


def image_bytes(reference: str, row: int) -> bytes:
    """The encoded image of a row."""
    data, column, _ = opened(reference)
    value = data[row][column]
    if value is None:
        return b""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def labels(reference: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and (N,) the class number of each row. Raises as `opened`, UsageError for unfit labels."""
    data, _, column = opened(reference)
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


@functools.lru_cache(maxsize=2)
def opened(reference: str) -> tuple[Any, str, str]:
    """The data set, its column of images (as bytes) and its column of labels.

    The one column of images and the one of class labels are found by their types; a column of text counts as labels
    too where there is none. UsageError for columns that do not fit and an unknown split, BadFileError for a damaged
    data set, ImportError says what to install.
    """
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
