"""Any images as a source that is read piece by piece: what `kindiff encode` works through."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from kindiff.classes import ClassSet, shorten
from kindiff.config import DataConfig
from kindiff.data import open_images
from kindiff.data.folder import list_folder
from kindiff.data.hierarchy import read_names
from kindiff.data.hub import open_hub
from kindiff.data.hub_rows import is_hub
from kindiff.data.manifest import MANIFEST
from kindiff.data.pieces import Source, labelled
from kindiff.data.prepared import ImageSet
from kindiff.errors import UsageError


def open_source(config: DataConfig) -> Source:
    """The images that a config asks for. Files of an image folder and a Hugging Face data set are not read yet;
    other images (avatars, groups of classes) are opened as training opens them. Raises what `open_images` raises.
    """
    path = Path(config.source).expanduser()
    plain = not config.groups and not config.source.startswith("avatars:") and not (path / MANIFEST).is_file()
    if plain and is_hub(config.source):
        return open_hub(config)
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
    classes = read_names(names) if names else source.classes
    if len(classes) != len(source.classes):
        raise UsageError(
            f"names {names} has {len(classes)} classes and {source.where} {len(source.classes)}; give as many."
        )
    return dataclasses.replace(source, classes=classes)


def _folder(folder: Path, config: DataConfig) -> Source:
    folder = folder.absolute()
    files = {name: listed[config.of_class] for name, listed in list_folder(folder, config.classes).items()}
    if empty := [name for name, listed in files.items() if not listed]:
        raise UsageError(
            f"{folder} has no images of class {shorten(empty)} from image {config.first} on; ask for earlier ones."
        )
    described = json.dumps([config.size, list(files.items())])
    return Source(
        classes=ClassSet(tuple(files)), labels=labelled([len(listed) for listed in files.values()]),
        size=config.size, identity=hashlib.sha256(described.encode()).hexdigest(), reader="files",
        where=str(folder), items=[f"{name}/{file}" for name, listed in files.items() for file, _, _ in listed],
    )  # fmt: skip
